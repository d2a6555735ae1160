"""`weft serve` on the throw-away host of `bench.isolated`, watched from outside."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from bench.inside.population import UNDERLAY, VNI, Population
from weft.dataplane import device_names
from weft.kernel import LinuxKernel
from weft.store import Store

T = TypeVar("T")

RUN = Path("/run/weft")
STATE = Path("/run/weft-state")
LOG = Path("/run/weft.log")
SOCKET = RUN / "weft.sock"
SETTINGS = {
    "WEFT_SOCKET": str(SOCKET),
    "WEFT_RUN": str(RUN),
    "WEFT_STATE": str(STATE),
    "WEFT_UNDERLAY": UNDERLAY,
    "WEFT_DOCKER": "off",
}
ETCD_BATCH = 998
ETCD_OPTIONS = (f"--max-txn-ops={ETCD_BATCH + 2}", "--log-level=error")
"""The store adds a receipt and the newest mark to each transaction."""
_PUT = re.compile(r"rows: (\d+) put")
"""Those of the network of probes come along."""
_PATIENCE = 120.0
_QUIET_SECONDS = 2.0
_QUIET_SHARE = 0.05
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Serving:
    """
    :param store: the setting WEFT_STORE.
    """

    def __init__(self, store: str) -> None:
        self._began = monotonic()
        with LOG.open("w") as log:
            serve = [sys.executable, "-m", "weft", "serve"]
            settings = {**os.environ, **SETTINGS, "WEFT_STORE": store}
            weft = subprocess.Popen(serve, env=settings, stdout=log, stderr=log)
        self._await("start", lambda: os.path.ismount(RUN / "dp"))
        self._worker = _child_of(weft.pid)

    def await_sync(self, population: Population) -> float:
        """Seconds from its start until the kernel has everything, as it says; `await_rest` looks whether that is so."""
        self._await(
            "come in sync", lambda: population.row_count <= max(map(int, _PUT.findall(LOG.read_text())), default=0)
        )
        return monotonic() - self._began

    def await_rest(self, population: Population) -> float:
        """Seconds from its start until it has nothing more to do."""
        self._await("come to rest", self._is_quiet)
        rest = monotonic() - self._began - _QUIET_SECONDS
        if (found := _rows()) != population.row_count:
            raise SystemExit(f"weft programmed {found} rows, not {population.row_count}:\n{LOG.read_text()}")
        return rest

    def memory(self) -> dict[str, float]:
        """Megabytes that it has, that it had at most, and that are its own (shared pages divided by their users)."""
        status = _table(Path(f"/proc/{self._worker}/status"))
        return {
            "rss_mb": _megabytes(status["VmRSS"]),
            "peak_mb": _megabytes(status["VmHWM"]),
            "pss_mb": _megabytes(_table(Path(f"/proc/{self._worker}/smaps_rollup"))["Pss"]),
        }

    def seconds(self) -> float:
        """Of a processor, so far."""
        user, system = _fields(Path(f"/proc/{self._worker}/stat"))[11:13]
        return (int(user) + int(system)) * _TICK

    def _is_quiet(self) -> bool:
        """Programming is not all: it reads the kernel's echoes of its writes, and perhaps compares everything again."""
        before = self.seconds()
        sleep(_QUIET_SECONDS)
        return self.seconds() - before < _QUIET_SHARE * _QUIET_SECONDS

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = monotonic() + _PATIENCE
        while not condition():
            if monotonic() > deadline:
                raise SystemExit(f"weft did not {what} within {_PATIENCE:g} s:\n{LOG.read_text()}")
            sleep(0.01)


def fill(store: Store, population: Population, host_id: str, *, batch: int) -> None:
    """So many records in one transaction."""
    for records in _batches(population.records(host_id), batch):
        store.transact([], records)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _rows() -> int:
    kernel = LinuxKernel(RUN)
    kernel.open()
    with closing(kernel):
        return len(kernel.observe_rows(device_names(VNI)))


def _child_of(parent: int) -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if int(_fields(stat)[1]) == parent:
            return int(stat.parent.name)
    raise SystemExit(f"weft has no worker:\n{LOG.read_text()}")


def _fields(stat: Path) -> list[str]:
    """Those after the process's name: state, parent, ..."""
    return stat.read_text().rpartition(")")[2].split()


def _table(path: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in path.read_text().splitlines() if ": " in line or ":\t" in line)


def _megabytes(kilobytes: str) -> float:
    return int(kilobytes.split()[0]) * 1024 / 1e6
