"""`SIZE`: starts `weft serve` on a store with so many remote endpoints; prints its memory when all is programmed.

The port of the one local endpoint is none that anybody made; its network is served nevertheless.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from bench.inside.population import UNDERLAY, VNI, records, row_count
from weft.dataplane import bridge_name, vxlan_name
from weft.identity import host_id
from weft.kernel import LinuxKernel
from weft.store.sqlite import SqliteStore

T = TypeVar("T")

RUN = Path("/run/weft")
STATE = Path("/run/weft-state")
STORE = STATE / "weft.db"
LOG = Path("/run/weft.log")
SETTINGS = {
    "WEFT_SOCKET": "/run/weft/weft.sock",
    "WEFT_RUN": str(RUN),
    "WEFT_STATE": str(STATE),
    "WEFT_STORE": f"sqlite://{STORE}",
    "WEFT_UNDERLAY": UNDERLAY,
    "WEFT_DOCKER": "off",
}
_BATCH = 10_000
_PATIENCE = 90.0
_QUIET_SECONDS = 2.0
_QUIET_SHARE = 0.05
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def main(size: int) -> dict[str, float]:
    _fill_store(size)
    began = monotonic()
    with LOG.open("w") as log:
        serve = [sys.executable, "-m", "weft", "serve"]
        weft = subprocess.Popen(serve, env={**os.environ, **SETTINGS}, stdout=log, stderr=log)
    _await("start", lambda: os.path.ismount(RUN / "dp"))
    worker = _child_of(weft.pid)
    _await("come to rest", lambda: _is_quiet(worker))
    rest = monotonic() - began - _QUIET_SECONDS
    if (found := _rows()) != row_count(size):
        raise SystemExit(f"weft programmed {found} rows, not {row_count(size)}:\n{LOG.read_text()}")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
    megabytes = {name: int(status[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM")}
    return {"rest_s": rest, "rss_mb": megabytes["VmRSS"], "peak_mb": megabytes["VmHWM"]}


def _fill_store(size: int) -> None:
    with closing(SqliteStore(STORE)) as store:
        for batch in _batches(records(host_id(STATE), size), _BATCH):
            store.transact([], batch)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _await(what: str, condition: Callable[[], bool]) -> None:
    deadline = monotonic() + _PATIENCE
    while not condition():
        if monotonic() > deadline:
            raise SystemExit(f"weft did not {what} within {_PATIENCE:g} s:\n{LOG.read_text()}")
        sleep(0.01)


def _rows() -> int:
    kernel = LinuxKernel(RUN)
    kernel.open()
    with closing(kernel):
        return len(kernel.observe_rows([bridge_name(VNI), vxlan_name(VNI)]))


def _child_of(parent: int) -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if int(_fields(stat)[1]) == parent:
            return int(stat.parent.name)
    raise SystemExit(f"weft has no worker:\n{LOG.read_text()}")


def _is_quiet(process: int) -> bool:
    """Programming is not all: it reads the kernel's echoes of its writes, and perhaps compares everything again."""
    before = _seconds(process)
    sleep(_QUIET_SECONDS)
    return _seconds(process) - before < _QUIET_SHARE * _QUIET_SECONDS


def _seconds(process: int) -> float:
    """Of a processor, so far."""
    user, system = _fields(Path(f"/proc/{process}/stat"))[11:13]
    return (int(user) + int(system)) * _TICK


def _fields(stat: Path) -> list[str]:
    """Those after the process's name: state, parent, ..."""
    return stat.read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
