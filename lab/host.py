"""One machine of the lab: network, mounts, /run, /etc and processes of its own, a Docker Engine and weft."""

import json
import shlex
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from lab import image
from lab.capture import tcpdump
from lab.daemon import Daemon, answers
from lab.engine import search_path
from lab.machine import Machine
from lab.plan import LABS, PROJECT, Plan
from lab.process import Environment, LabError, run
from lab.underlay import Underlay

DATAPLANE = "/run/docker/weft/dp"
PLUGIN_SOCKET = "/run/docker/plugins/weft.sock"
RESOLVER = "169.254.77.53"
REGISTRY_PORT = 5000

# What a machine has to itself. The new /sys shows its own links, but lacks the cgroups: they are moved over.
# /etc is a layer above the machine's: Docker's configuration and identity, names and resolvers are its own.
# /run is empty at each boot, but for the folder with the Engine's socket for callers outside. /run/docker
# is shared, as on a systemd machine: what a plugin in a container mounts there must appear outside of it.
_MACHINE = """
echo "$NAME" > /proc/sys/kernel/hostname
mount -n -t proc proc /proc
mkdir -p "$RUNTIME/mnt" "$DATA/etc" "$DATA/etc.work"
mount -n --rbind /sys/fs/cgroup "$RUNTIME/mnt"
mount -n -t sysfs sysfs /sys
mount -n --move "$RUNTIME/mnt" /sys/fs/cgroup
mount -n -t overlay overlay -o "lowerdir=/etc,upperdir=$DATA/etc,workdir=$DATA/etc.work" /etc
mount -n -t tmpfs -o mode=755 tmpfs "$RUNTIME/mnt"
mkdir -p "$RUNTIME/mnt/docker" "$RUNTIME/mnt/lock" "$RUNTIME/mnt/${RUNTIME#/run/}"
mount -n --bind "$RUNTIME" "$RUNTIME/mnt/${RUNTIME#/run/}"
mount -n --move "$RUNTIME/mnt" /run
mount -n --bind /run/docker /run/docker
mount -n --make-rshared /run/docker
"""


_REGISTRY = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "{place}"}}
"""


class Host(Machine):
    """`settings` (of weft), `engine_options` (of daemon.json), `programs` and `clock_offset` may be changed for the
    next start. `programs` says of which engine they are (see lab/engine.py).

    `clock_offset` is how many seconds weft's clock is ahead (see lab/clock). The engine's, a Go program's, stays right.
    """

    def __init__(self, plan: Plan, index: int, underlay: Underlay) -> None:
        super().__init__(plan, f"h{index}", index, underlay)
        self.docker_host = f"unix://{self.runtime}/docker.sock"
        self.settings = {**self._weft_defaults(plan), **(plan.settings or {})}
        self.engine_options = {**self._engine_defaults(plan), **(plan.engine_options or {})}
        self.programs = plan.engine
        self.clock_offset = 0
        self.engine = Daemon("dockerd", self._namespaces, self.data / "dockerd.log")
        self.weft = Daemon("weft", self._namespaces, self.data / "weft.log")
        self.registry = Daemon("registry", self._namespaces, self.data / "registry.log")

    def _weft_defaults(self, plan: Plan) -> dict[str, str]:
        return {
            "WEFT_SOCKET": PLUGIN_SOCKET,
            "WEFT_RUN": "/run/docker/weft",
            "WEFT_STATE": str(self.data / "weft"),
            "WEFT_STORE": plan.store_url,
            "WEFT_HOSTNAME": self.name,
            "WEFT_UNDERLAY": "eth0",
            "WEFT_DOCKER": "unix:///var/run/docker.sock" if plan.engines else "off",
            **(self._access(plan) if plan.secure else {}),
        }

    def _access(self, plan: Plan) -> dict[str, str]:
        folder = plan.certificates
        return {
            "WEFT_STORE_CA": str(folder / "ca.crt"),
            "WEFT_STORE_CERT": str(folder / "client.crt"),
            "WEFT_STORE_KEY": str(folder / "client.key"),
            "WEFT_STORE_USER": "weft",
            "WEFT_STORE_PASSWORD_FILE": str(plan.password),
        }

    def _engine_defaults(self, plan: Plan) -> dict[str, object]:
        return {
            "hosts": ["unix:///var/run/docker.sock", self.docker_host],
            "data-root": str(self.data / "docker"),
            "cgroup-parent": f"/{self.cgroup}",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "dns": [RESOLVER, plan.gateway] if plan.weft else [plan.gateway],
        }

    # The machine

    @property
    def daemons(self) -> list[Daemon]:
        return [*([self.weft] if self._plan.weft else []), *([self.engine] if self._plan.engines else [])]

    @property
    def cgroup(self) -> str:
        """Of its containers, in each hierarchy."""
        return f"{LABS}/{self._plan.name}/{self.name}"

    @property
    def root(self) -> Path:
        """Its files, as processes outside reach them."""
        return self._namespaces.root

    def boot(self) -> None:
        """weft is there before the engine, which would wait up to 15 s a call for a plugin it knows of."""
        self.boot_alone()
        if self._plan.weft:
            self.start_weft()
        if self._plan.engines:
            self.start_engine()
            self._import_image()
        else:
            self.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # as an engine does

    def boot_alone(self) -> None:
        """The machine, without its daemons."""
        self.power_on()
        folders = {"NAME": self.name, "RUNTIME": str(self.runtime), "DATA": str(self.data)}
        self.run("sh", "-ec", _MACHINE, env=folders)
        self._write_names()
        self.plug_in()

    def dataplane(self, *argv: str, check: bool = True, timeout: float = 60) -> str:
        if self.run("stat", "--file-system", "--format=%T", DATAPLANE, check=False) != "nsfs":
            raise LabError(f"{self.name} has no data plane: no network namespace is mounted at {DATAPLANE}")
        return self.run("nsenter", f"--net={DATAPLANE}", "--", *argv, check=check, timeout=timeout)

    def log(self, daemon: str) -> str:
        """Of "dockerd" or "weft", over all their starts."""
        return (self.data / f"{daemon}.log").read_text(errors="replace")

    # Docker

    def docker(self, *args: str, check: bool = True, timeout: float = 60) -> str:
        env = {**self._environment(), "DOCKER_CONFIG": str(self.runtime)}
        docker = shutil.which("docker", path=env["PATH"]) or "docker"
        shown = f"{self.name}$ {shlex.join(['docker', *args])}"
        argv = [docker, "--host", self.docker_host, *args]
        return run(argv, shown=shown, check=check, timeout=timeout, env=env)

    def exec_in_container_netns(
        self,
        container: str,
        *argv: str,
        check: bool = True,
        timeout: float = 60,
    ) -> str:
        """A program of the host, such as Python, with the container's network."""
        pid = self.docker("inspect", "--format", "{{.State.Pid}}", container)
        if pid == "0":
            raise LabError(f"{container} on {self.name} is not running")
        return self.run("nsenter", "-t", pid, "-n", "--", *argv, check=check, timeout=timeout)

    def start_missing(self) -> None:
        if self._plan.weft and not self.weft.pid:
            self.start_weft()
        if self._plan.engines and not self.engine.pid:
            self.start_engine()

    def start_engine(self, *options: str, timeout: float = 60) -> None:
        """With further options of dockerd; what daemon.json has already belongs into `engine_options`."""
        self.configure_engine()
        self.engine.start(
            ["dockerd", *options],
            env=self._environment(),
            ready=lambda: answers(self.runtime / "docker.sock", "GET /_ping"),
            timeout=timeout,
        )

    def configure_engine(self) -> None:
        self.write("etc/docker/daemon.json", json.dumps(self.engine_options, indent=2))

    def stop_engine(self, *, timeout: float = 60) -> None:
        self.engine.signal("TERM", timeout=timeout)

    def kill_engine(self) -> None:
        self.engine.signal("KILL", timeout=10)

    # weft

    def start_weft(self, settings: Environment = None, *, timeout: float = 30) -> None:
        """With further settings for this start only."""
        self.weft.start(
            [*self._weft_command(), "serve"],
            env={**self._environment(), **self._weft_environment(), **(settings or {})},
            ready=lambda: answers(self._namespaces.root / PLUGIN_SOCKET[1:], "POST /Plugin.Activate"),
            timeout=timeout,
        )

    def stop_weft(self, *, timeout: float = 30) -> None:
        self.weft.signal("TERM", timeout=timeout)

    def kill_weft(self) -> None:
        """With its workers, which would go on answering for a while."""
        self.weft.signal("KILL", timeout=10, group=True)

    def restart_weft(self) -> None:
        self.stop_weft()
        self.start_weft()

    def ask_weft(self, *args: str, timeout: float = 30) -> str:
        """What `weft ARGS` prints on this host."""
        return self.run(*self._weft_command(), *args, env=self._weft_environment(), timeout=timeout)

    def _weft_command(self) -> list[str]:
        venv = PROJECT / ".venv/bin/python"
        return [str(venv) if venv.exists() else sys.executable, "-m", "weft"]

    def _weft_environment(self) -> dict[str, str]:
        path = str(PROJECT / "plugin")
        clock = {"LAB_CLOCK_OFFSET": str(self.clock_offset)} if self.clock_offset else {}
        if clock:
            path = f"{PROJECT / 'lab/clock'}:{path}"
        return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **clock, **self.settings}

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "PATH": search_path(self.programs)}

    def shell_environment(self) -> dict[str, str]:
        """For somebody who types commands on it: `weft` is this one, with the settings of the host's daemon."""
        path = f"{PROJECT / '.venv/bin'}:{search_path(self.programs)}"
        return {**self._environment(), **self._weft_environment(), "PATH": path}

    # A registry

    def start_registry(self) -> str:
        """Serve images and plugins; return the place that their names begin with. It speaks HTTP, so the engines that
        use it need it among their `insecure-registries`."""
        place = f"{self.address}:{REGISTRY_PORT}"
        self.write("etc/docker/registry.yml", _REGISTRY.format(folder=self.data / "registry", place=place))
        self.registry.start(
            ["docker-registry", "serve", "/etc/docker/registry.yml"],
            env=self._environment(),
            ready=lambda: self._listens(REGISTRY_PORT),
            timeout=30,
        )
        return place

    def _listens(self, port: int) -> bool:
        try:
            self._namespaces.dial(self.address, port, timeout=1).close()
        except OSError:
            return False
        return True

    # The underlay

    def set_mtu(self, mtu: int) -> None:
        self.run("ip", "link", "set", "eth0", "mtu", str(mtu))
        self.narrow_path(mtu)

    def narrow_path(self, mtu: int) -> None:
        """Larger packets get lost whatever eth0 says, but for the kernel's TCP bundles, cut up behind it."""
        self._underlay.set_port(self.index, "mtu", str(mtu))

    def route_over_switch(self, other: Machine, mtu: int) -> None:
        """By way of a router whose next link carries no more than `mtu`. `route_directly` undoes it."""
        self._underlay.route(self._namespaces, other.address, mtu)

    def route_directly(self, other: Machine) -> None:
        self._underlay.unroute(self._namespaces, other.address)

    def drop_udp(self, port: int) -> None:
        """As a firewall on this host, for what comes in."""
        table = f"inet lab_{port}"
        chain = f"add chain {table} input {{ type filter hook input priority -300; }}"
        self.allow_udp(port)
        self.run("nft", f"add table {table}; {chain}; add rule {table} input udp dport {port} drop")

    def allow_udp(self, port: int) -> None:
        self.run("nft", f"add table inet lab_{port}; delete table inet lab_{port}")

    def capture(self, expression: str, *options: str) -> AbstractContextManager[list[str]]:
        """Yields a list that holds tcpdump's lines about eth0 once the block has ended."""
        return tcpdump(
            ["-i", "eth0", *options, expression],
            enter=self.enter,
            stop=lambda pid: self.run("sh", "-c", f"kill -INT {pid}", check=False),
        )

    def _write_names(self) -> None:
        hosts = [f"{self._plan.address(i)} h{i}" for i in range(1, self._plan.hosts + 1)]
        self.write("etc/hostname", f"{self.name}\n")
        self.write("etc/hosts", "\n".join(["127.0.0.1 localhost", *hosts, ""]))
        self.write("etc/resolv.conf", f"nameserver {self._plan.gateway}\n")

    def write(self, path: str, text: str) -> None:
        """A file of this host's own."""
        file = self._namespaces.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # it may be a link of the machine's, such as systemd's resolv.conf
        file.write_text(text)

    def _import_image(self) -> None:
        if not self.docker("images", "--quiet", image.NAME):
            command = f"CMD {json.dumps(image.COMMAND)}"
            self.docker("import", "--change", command, str(self._plan.data / "image.tar"), image.NAME)
