"""This host's own facts, looked up when the doctor asks: each part by itself, so that one that fails hides no other.

The daemon has all parts; the `weft` command, when the daemon does not run, has those that need nothing of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import sleep
from typing import Any, Protocol

from weft.agent import Agent
from weft.config import Settings
from weft.dataplane import Vxlan
from weft.doctor.facts import Facts, PortDrop, Switch
from weft.encryption import Encryption
from weft.engine.sweeper import Sweeper
from weft.errors import IN_USE, KernelError, WeftError
from weft.garbage import Garbage
from weft.presence import Presence
from weft.reconcile import ObservedLink
from weft.store import Store

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 0.5
"""What differs for so long is not just being done."""
_AGENT_SECONDS = 2.0
_LOOK_SECONDS = 6.0
_DAEMON_JSON = Path("/etc/docker/daemon.json")
_PROC = Path("/proc")
_DOCKER_SECONDS = 1.0
_UCRED = struct.Struct("3i")
"""What `SO_PEERCRED` gives (unix(7))."""

Part = Callable[[], Mapping[str, Any]]
"""Some fields of `Facts`; may raise `WeftError` if they cannot be had."""


class Host(Protocol):
    """See `kernel.Inspection`."""

    def device(self, address: str) -> tuple[str, int]: ...
    def address(self, spec: str, towards: Iterable[str]) -> str: ...
    def drops(self, ports: Iterable[int], peer: str, device: str) -> Iterator[PortDrop]: ...
    def users(self, ports: Iterable[int]) -> dict[int, str]: ...
    def switches(self) -> list[Switch]: ...
    def mounts(self) -> str: ...
    def reached(self, addresses: Iterable[str], source: str) -> dict[str, bool]: ...


class Kernel(Protocol):
    """See `kernel.LinuxKernel`."""

    def check(self) -> None: ...
    def observe_links(self) -> Mapping[str, ObservedLink]: ...
    def intruders(self) -> list[str]: ...


class Names(Protocol):
    """See `nameservice.NameService`."""

    problem: str

    def reached(self) -> bool | None: ...
    def is_first(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where this host is in the cluster now.

    :param others: the VTEP addresses of the other hosts.
    :param encrypts: it has, or had, an encrypted network.
    :param networks: names, by UDP port, of networks that have one of their own.
    :param ports: those of them that have a container here.
    """

    underlay: str
    others: Sequence[str]
    encrypts: bool = False
    networks: Mapping[int, str] = field(default_factory=dict)
    ports: Set[int] = frozenset()


class Checkup:
    """:param place: asked anew at each look, since addresses change."""

    def __init__(self, settings: Settings, host: Host, place: Callable[[], Place], parts: Iterable[Part]) -> None:
        self._settings = settings
        self._host = host
        self._place = place
        self._parts = (self._underlay, self._ports, self._switches, self._docker_dns, *parts)

    def look(self) -> Facts:
        """All that can be had within a few seconds."""
        s = self._settings
        found: dict[str, Any] = {}
        pool = ThreadPoolExecutor(len(self._parts), thread_name_prefix="checkup")
        looks = {pool.submit(_attempt, part): part for part in self._parts}
        late = wait(looks, _LOOK_SECONDS).not_done
        pool.shutdown(wait=False)
        for look, part in looks.items():
            if look in late:
                log.warning("a part of the checkup takes too long and is left out: %s", part)
            else:
                found.update(look.result())
        return Facts(name=s.hostname, port=s.port, wg_port=s.wg_port, resolver_address=s.dns, **found)

    def reached(self, addresses: Iterable[str]) -> dict[str, bool]:
        """Which of the other hosts' VTEP addresses answer a ping from ours."""
        try:
            return self._host.reached(addresses, self._place().underlay)
        except (WeftError, OSError, ValueError):
            return {}

    def _underlay(self) -> dict[str, Any]:
        place = self._place()
        if not place.underlay:
            return {}
        device, mtu = self._host.device(place.underlay)
        return {
            "underlay": place.underlay,
            "device": device,
            "mtu": mtu,
            "towards": self._host.address("", place.others) if place.others else "",
        }

    def _ports(self) -> dict[str, Any]:
        place, s = self._place(), self._settings
        shared = [s.port, *([s.wg_port] if place.encrypts else [])]
        own = {port: name for port, name in place.networks.items() if port not in shared}
        users = self._host.users([*shared, *own]).items()
        found = {
            "users": {port: user for port, user in users if not user.startswith("wireguard-go")},
            "networks": own,
        }
        if not place.underlay:
            return found
        peer = place.others[0] if place.others else place.underlay
        device, _ = self._host.device(place.underlay)
        drops = self._host.drops([*shared, *(own.keys() & place.ports)], peer, device)
        return {**found, "drops": tuple(replace(drop, network=own.get(drop.port, "")) for drop in drops)}

    def _switches(self) -> dict[str, Any]:
        return {"switches": tuple(self._host.switches()), "mounts": self._host.mounts()}

    def _docker_dns(self) -> dict[str, Any]:
        s = self._settings
        return {} if not s.dns or s.managed or s.docker == "off" else {"dns": docker_dns(s.dns, s.docker)}


def of_store(store: Store) -> Part:
    return lambda: {"store": store.health()}


def of_daemon(
    settings: Settings,
    kernel: Kernel,
    agent: Agent,
    presence: Presence,
    encryption: Encryption,
    garbage: Garbage,
    sweeper: Sweeper | None,
    names: Names | None,
) -> list[Part]:
    """What only the daemon knows."""

    def refused() -> str:
        """A device that weft has shows that the port is its own: the kernel was busy closing another one."""
        if IN_USE not in agent.problem:
            return ""
        links = (seen.link for seen in kernel.observe_links().values())
        own = {link.port for link in links if isinstance(link, Vxlan) and not link.encrypted}
        return "" if any(f"UDP port {port} " in agent.problem for port in own) else agent.problem

    def able() -> dict[str, Any]:
        if any(isinstance(seen.link, Vxlan) for seen in kernel.observe_links().values()):
            return {}  # it has made one
        try:
            kernel.check()
        except KernelError as error:
            return {"kernel": str(error)}
        return {}

    def drift() -> dict[str, Any]:
        first = set(_plan(agent))
        if not first:
            return {}
        sleep(_AGAIN_SECONDS)
        return {"drift": tuple(change for change in _plan(agent) if change in first), "unmended": agent.problem}

    def orphans() -> dict[str, Any]:
        if not sweeper:
            return {}
        if sweeper.problem:
            return {"engine": sweeper.problem}
        orphans = set(_missing(garbage))
        if orphans:
            sleep(_AGAIN_SECONDS)
            orphans &= set(_missing(garbage))
        return {"orphans": tuple(sorted(orphans)), "conflicts": tuple(sorted(sweeper.conflicts.values()))}

    def named() -> dict[str, Any]:
        if not names or not settings.dns:
            return {}
        if names.problem:
            return {"resolver": names.problem}
        found: dict[str, Any] = {"filtered": names.reached() is False}
        if settings.managed and not found["filtered"] and names.is_first() is False:  # it cannot see daemon.json
            found["dns"] = f"containers here are not told what only {settings.dns} knows"
        return found

    def self_view() -> dict[str, Any]:
        return {
            "registered": presence.problem,
            "refused": refused(),
            "encryption": encryption.problem,
        }

    def guarded() -> dict[str, Any]:
        return {"intruders": tuple(kernel.intruders())}

    return [able, drift, orphans, named, self_view, guarded]


def _missing(garbage: Garbage) -> Iterator[str]:
    yield from (f"{one.what}: {one.why}" for one in garbage.mine())


def _plan(agent: Agent) -> list[str]:
    return [change for _, change in agent.preview(_AGENT_SECONDS)]


def _attempt(part: Part) -> Mapping[str, Any]:
    try:
        return part()
    except WeftError as error:
        log.debug("a part of the checkup: %s", error)
    except Exception:
        log.exception("a part of the checkup met a bug")
    return {}


def docker_dns(resolver: str, docker: str, file: Path = _DAEMON_JSON, proc: Path = _PROC) -> str:
    """Why Docker does not ask our resolver first; "" if it does, or if it cannot be told.

    :param docker: URL of the Docker API.
    """
    for words in _dockerds(proc, _listener(docker)):
        given = [b for a, b in zip(words, [*words[1:], ""], strict=True) if a == "--dns"]
        given += [word.removeprefix("--dns=") for word in words if word.startswith("--dns=")]
        if given:
            return "" if given[0] == resolver else f"dockerd was started with --dns {given[0]}, not {resolver}, first"
        for a, b in zip(words, [*words[1:], ""], strict=True):
            file = Path(b) if a == "--config-file" else file
            file = Path(a.removeprefix("--config-file=")) if a.startswith("--config-file=") else file
    try:
        servers = json.loads(file.read_text()).get("dns") or []
    except FileNotFoundError:
        return f"there is no {file}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{file} cannot be read: {error}"
    if servers[:1] == [resolver]:
        return ""
    return (
        f"{file} has {json.dumps(servers)} as dns, and {resolver} must be the first"
        if servers
        else f"{file} has no dns"
    )


def _listener(docker: str) -> int:
    """The process that made this socket; 0 if that cannot be told."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_DOCKER_SECONDS)
        client.connect(docker.removeprefix("unix://"))
        pid, _, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(pid)
    return 0


def _dockerds(proc: Path, listener: int) -> Iterator[list[str]]:
    """The command lines of the dockerds that we see: of the one that made the socket, else (systemd may have made it)
    of all that are in no container."""
    found = {}
    for entry in proc.glob("[0-9]*"):
        with suppress(OSError):
            words = [os.fsdecode(word) for word in (entry / "cmdline").read_bytes().split(b"\0")]
            if Path(words[0]).name == "dockerd" and (int(entry.name) == listener or not _is_contained(entry)):
                found[int(entry.name)] = words
    yield from [found[listener]] if listener in found else found.values()


def _is_contained(process: Path) -> bool:
    """Whether it is in a PID namespace of its own (proc_pid_status(5), "NSpid")."""
    found = re.search(r"^NSpid:\s+\d+\s+\d", (process / "status").read_text(), re.MULTILINE)
    return found is not None
