"""A computer on the lab's switch: namespaces, a network card and an address. Hosts and members of etcd are such."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lab.daemon import Daemon
from lab.namespaces import Namespaces
from lab.plan import PATH, Plan
from lab.process import Environment
from lab.underlay import Underlay


class Machine(ABC):
    """`index` is its port of the switch."""

    def __init__(self, plan: Plan, name: str, index: int, underlay: Underlay) -> None:
        self.name = name
        self.index = index
        self.address = plan.address(index)
        self.runtime = plan.runtime / name
        self.data = plan.data / name
        self._plan = plan
        self._underlay = underlay
        self._namespaces = Namespaces(f"{plan.name}/{name}", plan.runtime / f"{name}.holder")

    @property
    def up(self) -> bool:
        return self._namespaces.holder is not None

    def power_on(self) -> None:
        """Namespaces and folders; nothing runs yet, and no cable is plugged in."""
        self.runtime.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(parents=True, exist_ok=True)
        self._namespaces.create()

    def plug_in(self) -> None:
        self._underlay.plug_in(self._namespaces, self.index, self.address)

    def crash(self) -> None:
        """As if the power failed: nobody can say goodbye. The data folder is what a disk would keep."""
        self._underlay.unplug(self.index)
        self._namespaces.destroy()

    @property
    @abstractmethod
    def daemons(self) -> list[Daemon]:
        """What runs on it."""

    @abstractmethod
    def boot(self) -> None:
        """Power on, and start the daemons."""

    @abstractmethod
    def start_missing(self) -> None:
        """Start those daemons that do not run."""

    def mend(self) -> None:
        """Whatever was frozen, killed, unplugged or crashed works again."""
        if not self.up:
            self.boot()
            return
        self.restore_link()
        for daemon in self.daemons:
            daemon.thaw()
        self.start_missing()

    def run(self, *argv: str, check: bool = True, timeout: float = 60, env: Environment = None) -> str:
        environment = {**self._environment(), **(env or {})}
        return self._namespaces.run(argv, check=check, timeout=timeout, env=environment)

    def enter(self, argv: Sequence[str]) -> list[str]:
        """The command line which runs argv inside, for callers who start processes themselves."""
        return self._namespaces.enter(argv)

    # The underlay

    def cut_link(self) -> None:
        """Pulls the cable: eth0 keeps its address and routes, but has no carrier."""
        self._underlay.connect(self._namespaces, self.index, False)

    def restore_link(self) -> None:
        self._underlay.connect(self._namespaces, self.index, True)

    def cut_from(self, *others: "Machine") -> None:
        """IP packets between this machine and those get lost, both ways and without a word. All else passes."""
        self._underlay.part(self.index, [other.index for other in others])

    def restore_to(self, *others: "Machine") -> None:
        self._underlay.join(self.index, [other.index for other in others])

    def block_udp(self, port: int, *others: "Machine") -> None:
        """What this machine sends to a UDP port of those gets lost on the way, without a word."""
        for other in others:
            self._underlay.block(self.index, other.index, port)

    def change_address(self, address: str) -> None:
        """As DHCP might: the old one is gone at once. It lasts over a reboot."""
        self._underlay.readdress(self._namespaces, address)
        self.address = address

    def _environment(self) -> dict[str, str]:
        """Not the caller's, whose proxies and DOCKER_* variables have no meaning in here."""
        return {"PATH": PATH, "HOME": str(self.data), "LANG": "C.UTF-8"}
