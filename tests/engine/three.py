"""Three hosts and three members of etcd: what they know, what they lose, and what is measured meanwhile."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

from lab import CommandFailed, Host, Lab, LabError
from lab.host import DATAPLANE
from tests.engine.agreement import kernel_facts
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from tests.engine.traffic import Pings, pings

SUBNET = "10.77.0.0/24"


class Three(Cluster):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.h3 = lab.hosts[2]
        self.etcd = lab.etcd
        self.ids = {host: (host.data / "weft/host-id").read_text().strip() for host in lab.hosts}

    def mentions(self, host: Host) -> list[str]:
        """Keys of all entries in which a host occurs."""
        return [k for k, value in self.etcd.entries().items() if self.ids[host] in k or self.ids[host] in value]

    def alive(self) -> set[str]:
        """Names of the hosts that give signs of life."""
        present = {key.removeprefix("topology/alive/") for key in self.keys("topology/alive/")}
        return {host.name for host, known in self.ids.items() if known in present}

    def has_row(self, host: Host, address: str) -> bool:
        return any(fact.startswith(f"neighbour {address} ") for fact in kernel_facts(host))

    def refused(self, host: Host, *options: str) -> tuple[str, float]:
        """What Docker says to a container that cannot start, and after how many seconds."""
        began = time.monotonic()
        try:
            host.docker("run", "--rm", "--network", "app", *options, IMAGE, "true")
        except CommandFailed as error:
            return str(error), time.monotonic() - began
        raise AssertionError(f"a container could start on {host.name}")

    def starts(self, host: Host) -> bool:
        """Whether a container can start, and reaches the other hosts' ones."""
        return "ran" in host.docker("run", "--rm", "--network", "app", IMAGE, "echo", "ran", check=False)

    def repair(self) -> None:
        """After any test, even one that failed half-way."""
        self.lab.mend()
        eventually(lambda: self.alive() == {"h1", "h2", "h3"}, "all hosts are alive", timeout=20)
        self.clean()


class Addresses(dict[Host, str]):
    """Of the containers `web-HOST`, one on each host."""

    @contextmanager
    def traffic(self) -> Iterator[list[Pings]]:
        """Pings from each to the next, in a circle."""
        hosts = list(self)
        with ExitStack() as stack:
            ways = zip(hosts, hosts[1:] + hosts[:1], strict=True)
            yield [stack.enter_context(pings(a, f"web-{a.name}", self[b])) for a, b in ways]

    def only(self, *hosts: Host) -> Addresses:
        return Addresses({host: self[host] for host in hosts})

    def all_reach(self, timeout: float = 10) -> None:
        def complete() -> bool:
            return all(reaches(a, f"web-{a.name}", self[b]) for a in self for b in self if a is not b)

        eventually(complete, "every container reaches every other one", timeout=timeout)


class Starts:
    """Containers that start on a host, one after the other, until told to stop; refused ones are tried again."""

    def __init__(self, cluster: Three, host: Host) -> None:
        self.addresses: list[str] = []
        self.at: dict[str, float] = {}
        """When `docker run` returned, by address."""
        self.refused = 0
        self._cluster = cluster
        self._host = host
        self._stop = Event()
        self._thread = Thread(target=self._loop)

    def __enter__(self) -> Starts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, number: int, timeout: float) -> None:
        """Wait until so many more have started."""
        wanted = len(self.addresses) + number
        eventually(lambda: len(self.addresses) >= wanted, f"{number} more containers start", timeout=timeout)

    def _loop(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                address = self._cluster.run(self._host, f"many-{number}", "app")
                self.at[address] = time.monotonic()
                self.addresses.append(address)
            except LabError:
                self.refused += 1


class Arrivals:
    """When the addresses of other hosts' containers appear in a host's kernel."""

    def __init__(self, host: Host) -> None:
        self.seen: dict[str, float] = {}
        self._host = host
        self._stop = Event()
        self._thread = Thread(target=self._loop)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def lag(self, starts: Starts) -> float:
        """The longest time from a container's start to its appearance."""
        return max(seen - starts.at[address] for address, seen in self.seen.items() if address in starts.at)

    def _loop(self) -> None:
        while not self._stop.is_set():
            for address in re.findall(r"^\S+", self._host.dataplane("ip", "neigh"), re.MULTILINE):
                self.seen.setdefault(address, time.monotonic())
            time.sleep(0.05)  # the figure's resolution


def refusal(host: Host, settings: Mapping[str, str]) -> str:
    """Why weft does not start on a host with these settings. It is stopped then."""
    host.stop_weft()
    try:
        host.start_weft(settings)
    except LabError as error:
        return str(error)
    raise AssertionError(f"weft starts on {host.name} with {settings}")


_MONITOR = "ip monitor link neigh & a=$!; bridge monitor fdb & b=$!; read _; kill $a $b"
_LASTING = re.compile(r" qdisc |permanent|static|PERMANENT")
"""The kernel says it again when a bridge port has been up for a while, but then without its qdisc."""


@contextmanager
def kernel_changes(host: Host) -> Iterator[list[str]]:
    """Yields a list that at the end holds each change of a link or a lasting row of the data plane."""
    lines: list[str] = []
    argv = host.enter(["nsenter", f"--net={DATAPLANE}", "--", "sh", "-c", _MONITOR])
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield lines
        finally:
            shown, _ = process.communicate("\n", timeout=10)
            lines.extend(line for line in shown.splitlines() if _LASTING.search(line))


@contextmanager
def undisturbed(*hosts: Host) -> Iterator[None]:
    """No link and no lasting row changes in these hosts' kernels meanwhile, not even for a moment."""
    before = {host: kernel_facts(host) for host in hosts}
    with ExitStack() as stack:
        changes = [stack.enter_context(kernel_changes(host)) for host in hosts]
        yield
    for host, lines in zip(hosts, changes, strict=True):
        assert lines == [], f"{host.name}'s kernel was changed: {lines}"
        assert kernel_facts(host) == before[host]
