"""What a lab consists of: numbers, addresses and folders. Nothing here starts anything."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from lab.process import LabError

PROJECT = Path(__file__).resolve().parent.parent
LABS = os.environ.get("LAB_FOLDER", "weft-lab")
"""The folder of all labs in /run and /var/lib, and their cgroup. With another name, two checkouts can test at once."""
RUNTIME = Path("/run", LABS)
# The distribution's Docker comes before one that happens to be first in the caller's PATH.
PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
CLIENT_PORT = 2379
"""On which members of etcd serve."""
STORES = ("sqlite", "etcd", "etcds")
"""The last is etcd with TLS and users."""


@dataclass(frozen=True)
class Plan:
    hosts: int = 2
    name: str = "lab"
    subnet: str = "192.168.78.0/24"
    mtu: int = 1500
    weft: bool = True
    settings: Mapping[str, str] | None = None
    engine_options: Mapping[str, object] | None = None
    engine: str = os.environ.get("LAB_ENGINE", "")
    data_root: str = f"/var/lib/{LABS}"
    store: str = "sqlite"
    engines: bool = True

    def __post_init__(self) -> None:
        # The name becomes part of folders which are deleted at the end.
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,23}", self.name):
            raise LabError(f"{self.name!r} cannot be a lab's name: at most 24 of a-z, 0-9 and -")
        if not 1 <= self.hosts <= 250:
            raise LabError(f"a lab has 1 to 250 hosts, not {self.hosts}")
        if self.store not in STORES:
            raise LabError(f"a lab's store is one of {', '.join(STORES)}, not {self.store!r}")

    @property
    def runtime(self) -> Path:
        return RUNTIME / self.name

    @property
    def data(self) -> Path:
        return Path(self.data_root) / self.name

    @property
    def network(self) -> IPv4Network | IPv6Network:
        return ip_network(self.subnet)

    @property
    def gateway(self) -> str:
        return str(self.network[254])

    def address(self, index: int) -> str:
        return str(self.network[index])

    @property
    def members(self) -> dict[int, str]:
        """Names of etcd's members by their port of the switch; none if the store is another."""
        return {250 + number: f"etcd{number}" for number in (1, 2, 3)} if self.store != "sqlite" else {}

    @property
    def store_url(self) -> str:
        places = ",".join(f"{in_url(self.address(index))}:{CLIENT_PORT}" for index in self.members)
        return f"{self.store}://{places}" if places else f"sqlite://{self.data}/store.db"

    @property
    def secure(self) -> bool:
        """The store wants certificates, and a user's password."""
        return self.store == "etcds"

    @property
    def certificates(self) -> Path:
        """Folder of the CA's certificate and of what it has signed."""
        return self.data / "certificates"

    @property
    def password(self) -> Path:
        """File with that of etcd's user `weft`; there once etcd asks for it."""
        return self.certificates / "password"

    def save(self) -> None:
        self.runtime.mkdir(parents=True)
        (self.runtime / "plan.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, name: str) -> "Plan":
        """The plan of a lab that is up; the defaults if there is none, which find nothing but leftovers."""
        try:
            return cls(**json.loads((cls(name=name).runtime / "plan.json").read_text()))
        except (FileNotFoundError, ValueError):
            return cls(name=name)


def in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
