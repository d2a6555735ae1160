"""N Docker Engines on one machine, each in namespaces of its own, joined by a switch, each with its own weft.

    with Lab(hosts=2) as lab:
        h1, h2 = lab.hosts
        h1.docker("network", "create", "-d", "weft", "--ipam-driver", "weft", "app")

Labs of different names do not meet. All there is of one lives in its namespaces (see namespaces.py), in
/run/weft-lab/NAME, in /var/lib/weft-lab/NAME and in cgroups below weft-lab/NAME; nothing else is touched.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lab import image
from lab.engine import search_path
from lab.etcd import Etcd
from lab.host import Host
from lab.machine import Machine
from lab.namespaces import Namespaces
from lab.plan import LABS, PROJECT, Plan
from lab.process import LabError, all_at_once, wait_until
from lab.underlay import Underlay

CGROUPS = Path("/sys/fs/cgroup")


class Lab:
    def __init__(
        self,
        hosts: int = 2,
        name: str = "lab",
        *,
        subnet: str = "192.168.78.0/24",
        mtu: int = 1500,
        weft: bool = True,
        settings: Mapping[str, str] | None = None,
        engine_options: Mapping[str, object] | None = None,
        engine: str = Plan.engine,
        data_root: str = Plan.data_root,
        store: str = Plan.store,
        engines: bool = True,
    ) -> None:
        """`settings`: further variables for weft. `engine_options`: further keys of daemon.json.
        `engine`: another than the machine's (see engine.py). `data_root`: where hosts' disks are.
        `store`: "sqlite", one file for all, or three members on the switch: "etcd", or "etcds" with TLS and users.
        `engines`: without them, hosts have weft alone, and many start quickly."""
        self.plan = Plan(hosts, name, subnet, mtu, weft, settings, engine_options, engine, data_root, store, engines)
        self.underlay = Underlay(self.plan)
        self.etcd = Etcd(self.plan, self.underlay)
        self.hosts = [Host(self.plan, index, self.underlay) for index in range(1, hosts + 1)]

    @classmethod
    def load(cls, name: str) -> "Lab":
        """The lab of that name as it was started, by whomever."""
        plan = Plan.load(name)
        return cls(**{field: getattr(plan, field) for field in plan.__dataclass_fields__})

    def __enter__(self) -> "Lab":
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabError(f"there is no host {name}: this lab has {', '.join(h.name for h in self.hosts)}")

    def up(self) -> None:
        """What an earlier lab of this name left behind goes first. After a failure nothing is left either."""
        self._check_machine()
        self.down()
        try:
            self.plan.save()
            self.plan.data.mkdir(parents=True)
            image.build(self.plan.data / "image.tar")
            self.underlay.create()
            self.etcd.boot()
            all_at_once(Host.boot, self.hosts)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """By what is on disk: thus it ends a lab of another size as well, or one that crashed half-way."""
        records = [*self.plan.runtime.glob("*.holder"), self.plan.runtime / "switch"]
        all_at_once(Namespaces.destroy, [Namespaces(f"{self.plan.name}/{r.stem}", r) for r in records])
        for controller in (CGROUPS, *CGROUPS.glob("*/")):
            _remove(controller / LABS / self.plan.name, _remove_cgroup)
        for folder in (self.plan.runtime, self.plan.data):
            _remove(folder, shutil.rmtree)

    def mend(self) -> None:
        """Whatever was cut, frozen, killed or crashed works again; what runs goes on."""
        self.underlay.mend()
        all_at_once(Machine.mend, self.etcd.members)
        all_at_once(Machine.mend, self.hosts)

    def _check_machine(self) -> None:
        problems = {
            "it needs root, for the namespaces": os.geteuid() == 0,
            "there is no dockerd (lab/setup.sh installs it)": shutil.which(
                "dockerd", path=search_path(self.plan.engine)
            ),
            "no cgroups are mounted at /sys/fs/cgroup": CGROUPS.exists() and any(CGROUPS.iterdir()),
            "plugin/weft is not there": not self.plan.weft or (PROJECT / "plugin/weft/__main__.py").exists(),
        }
        if missing := [problem for problem, fine in problems.items() if not fine]:
            raise LabError(f"the lab cannot start here: {'; '.join(missing)}")


def _remove(folder: Path, how: Callable[[Path], None]) -> None:
    """And the folder above it, if that held nothing but this lab."""
    if folder.exists():
        how(folder)
        with suppress(OSError):
            folder.parent.rmdir()


def _remove_cgroup(cgroup: Path) -> None:
    """The kernel lets go of a cgroup a moment after the end of the last process in it."""

    def is_gone() -> bool:
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
        return not cgroup.exists()

    wait_until(is_gone, f"removal of {cgroup}")
