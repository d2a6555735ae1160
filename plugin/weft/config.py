"""The process environment as one frozen `Settings`; the only reader of `os.environ`.

Every setting has a default that suits one host. All problems are reported together, so that a person corrects them
in one go.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.model import WIREGUARD_POOL, IPNetwork

_PLACE = r"(?:\[[0-9a-fA-F:.]+\]|[\w.-]+):\d{1,5}"
_ETCD = re.compile(rf"etcd(?P<tls>s?)://(?P<places>{_PLACE}(?:,{_PLACE})*)(?P<root>/[\w./-]*)?")


_PACKAGE = Path(__file__).parent
RESOLVER = "169.254.77.53"
_NO_HOSTS = [IPv4Network(one) for one in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")]
"""Of this network, of this host, of the link; multicast and what is reserved (RFC 6890)."""


@dataclass(frozen=True, slots=True)
class PoolRange:
    """Automatic pools of prefix length `size` are cut from `base`."""

    base: IPNetwork
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """An IP address and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Settings:
    """See `SETTINGS` for what each means; the field `x` is the variable `WEFT_X`."""

    socket: Path
    run: Path
    state: Path
    store: str
    store_ca: Path | None
    store_cert: Path | None
    store_key: Path | None
    store_user: str
    store_password_file: Path | None
    hostname: str
    underlay: str
    underlay_family: int
    port: int
    wg_port: int
    wg_pool: IPv4Network | None
    allow_plain_store: bool
    key_rotation: float
    pools: tuple[PoolRange, ...]
    docker: str
    driver: str
    scope: str
    dns: str
    listen: Place | None
    listen_names: frozenset[str]
    mirror: bool
    resync: float
    probe_interval: float
    gc_grace: float
    host_grace: float
    log: Mapping[str, str]
    log_format: str

    @property
    def managed(self) -> bool:
        """True for a managed plugin: only the name of such a one has a tag."""
        return ":" in self.driver

    @property
    def mirrors(self) -> bool:
        """True if this host's networks are made on all. Swarm makes its own where they are used."""
        return self.mirror and self.scope == "local"

    @property
    def sqlite_path(self) -> Path:
        return Path(self.store.removeprefix("sqlite://"))

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """URLs of etcd's members; none if the store is another."""
        found = _ETCD.fullmatch(self.store)
        if found is None:
            return ()
        scheme = "https" if found["tls"] else "http"
        return tuple(f"{scheme}://{place}" for place in dict.fromkeys(found["places"].split(",")))

    @property
    def encryption_refusal(self) -> str:
        """Why there can be no encrypted network with these settings; "" if there can."""
        if self.store.startswith("etcd://") and not self.allow_plain_store:
            return (
                "encrypted networks need a store with TLS, since who can write the store decides who can read them: "
                "set WEFT_STORE to etcds://..., or WEFT_ALLOW_PLAIN_STORE=1 if nobody else reaches etcd"
            )
        return ""

    @property
    def store_origin(self) -> str:
        """What tells this store, as it is reached now, from another."""
        access = (self.store_ca, self.store_cert, self.store_key, self.store_user, self.store_password_file)
        return " ".join([self.store, *(str(one) for one in access if one)])

    @property
    def etcd_root(self) -> str:
        """What all keys in etcd begin with."""
        found = _ETCD.fullmatch(self.store)
        path = (found["root"] or "").strip("/") if found else ""
        return f"/{path}/" if path else "/weft/v1/"


@dataclass(frozen=True, slots=True)
class Setting:
    """One variable: its default as the user would write it, how to read it, and what it means."""

    default: str
    parse: Callable[[str], Any]
    meaning: str


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Read the settings; raise one `ConfigError` that names every variable that is wrong or unknown."""
    values: dict[str, Any] = {}
    problems = [
        f"{name} is not a setting of weft (they are: {', '.join(map(variable, SETTINGS))})"
        for name in sorted(environment)
        if name.startswith("WEFT_") and name.removeprefix("WEFT_").lower() not in SETTINGS
    ]
    for name, setting in SETTINGS.items():
        text = environment.get(variable(name), "") or setting.default
        try:
            values[name] = setting.parse(text)
        except ValueError as error:
            problems.append(f"{variable(name)}={_shown(text)!r}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    settings = Settings(**values)
    if problems := list(_contradictions(settings)):
        raise ConfigError("; ".join(problems))
    return settings


def view(settings: Settings) -> dict[str, str]:
    """All of them, as texts. None is a secret: those are in files."""
    return {name: str(getattr(settings, name)) for name in SETTINGS}


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"WEFT_{name.upper()}"


def _contradictions(settings: Settings) -> Iterator[str]:
    tls = settings.store_ca or settings.store_cert or settings.store_key
    if tls and not settings.store.startswith("etcds://"):
        yield "WEFT_STORE_CA, WEFT_STORE_CERT and WEFT_STORE_KEY are for a WEFT_STORE that begins with etcds://"
    if bool(settings.store_cert) != bool(settings.store_key):
        yield "WEFT_STORE_CERT and WEFT_STORE_KEY belong together"
    if bool(settings.store_user) != bool(settings.store_password_file):
        yield "WEFT_STORE_USER and WEFT_STORE_PASSWORD_FILE belong together"
    if settings.store_user and not settings.etcd_endpoints:
        yield "WEFT_STORE_USER is for a WEFT_STORE that begins with etcd:// or etcds://"
    if settings.scope == "global" and not settings.managed:
        yield (
            f"WEFT_SCOPE=global is for the managed plugin, and {settings.driver} (WEFT_DRIVER) is none: Docker Swarm "
            "uses no other driver. Install weft with docker plugin install, or leave WEFT_SCOPE out"
        )


def _shown(text: str) -> str:
    """What was set, without a password that somebody wrote into a URL."""
    return re.sub(r"[^/,]*@", "***@", text)


def _path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("must be an absolute path")
    return Path(text)


def _path_or_none(text: str) -> Path | None:
    return _path(text) if text else None


def _store(text: str) -> str:
    if text.startswith("etcd") and "@" in text:
        raise ValueError("user and password have settings of their own, WEFT_STORE_USER and WEFT_STORE_PASSWORD_FILE")
    if not (text.startswith("sqlite:///") or _ETCD.fullmatch(text)):
        raise ValueError("must be sqlite:///path/to/file, etcd://host:port,host:port or, with TLS, etcds://host:port")
    return text


def _hostname(text: str) -> str:
    return text or platform.node() or "host"


def _family(text: str) -> int:
    """The IP version; 0 is whichever there is."""
    families = {"auto": 0, "ipv4": 4, "ipv6": 6}
    if text not in families:
        raise ValueError(f"must be {', '.join(families)}")
    return families[text]


def _port(text: str) -> int:
    if not (text.isdigit() and 0 < int(text) < 65536):
        raise ValueError("must be a UDP port from 1 to 65535")
    return int(text)


def _wg_pool(text: str) -> IPv4Network | None:
    """None is the one that weft chooses."""
    if text == "auto":
        return None
    pool = IPv4Network(text)
    if not 8 <= pool.prefixlen <= 24:
        raise ValueError("must have a prefix length from 8 to 24, so that it has an address for every host")
    if any(map(pool.overlaps, _NO_HOSTS)):
        raise ValueError("must be addresses that hosts can have, such as 10.99.0.0/16")
    return pool


def _seconds(text: str) -> float:
    value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not 0.1 <= value <= 86400:
        raise ValueError("must be a number of seconds from 0.1 to 86400")
    return value


def _interval(text: str) -> float:
    """Seconds; 0 is never."""
    value = float(text) if text.replace(".", "", 1).isdigit() else -1.0
    if value and not 1 <= value <= 3600:
        raise ValueError("must be a number of seconds from 1 to 3600, or 0 for never")
    return value


def _levels(text: str) -> dict[str, str]:
    """Levels by module; "" is all others."""
    levels = {"": "info"}
    for part in text.split(","):
        module, level = part.rpartition("=")[::2]
        if level not in ("debug", "info", "warning", "error"):
            raise ValueError("must be debug, info, warning or error; or also for single modules, info,agent=debug")
        if not _is_module(module):
            raise ValueError(f"{module} is not a module of weft, such as agent or kernel.rows")
        levels[module] = level
    return levels


def _is_module(name: str) -> bool:
    place = _PACKAGE.joinpath(*name.split("."))
    return not name or place.with_suffix(".py").is_file() or place.is_dir()


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError("must be text or json")
    return text


def _switch(text: str) -> bool:
    if text not in ("on", "off", "1", "0"):
        raise ValueError("must be on or off")
    return text in ("on", "1")


def _rotation(text: str) -> float:
    """Seconds; 0 is never."""
    if text == "off":
        return 0.0
    value = float(text) if text.replace(".", "", 1).isdigit() else 0.0
    if not 1 <= value <= 365:
        raise ValueError("must be a number of days from 1 to 365, or off")
    return value * 86400


def _scope(text: str) -> str:
    if text not in ("local", "global"):
        raise ValueError("must be local, or global for the networks of Docker Swarm")
    return text


def _docker(text: str) -> str:
    if text != "off" and not text.startswith(("unix:///", "tcp://")):
        raise ValueError("must be unix:///path, tcp://host:port, or off")
    return text


def _dns(text: str) -> str:
    if text == "off":
        return ""
    address = IPv4Address(text)
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        raise ValueError("must be an address that containers can ask: not a loopback or multicast one; or off")
    return str(address)


def _listen(text: str) -> Place | None:
    if text == "off":
        return None
    address, _, port = text.rpartition(":")
    try:
        found = ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        found = None
    bracketed = address.startswith("[") and address.endswith("]")
    if found is None or bracketed != (found.version == 6) or not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("must be ADDRESS:PORT, such as 127.0.0.1:9789, 0.0.0.0:9789 or [::1]:9789; or off")
    return Place(str(found), int(port))


def _names(text: str) -> frozenset[str]:
    names = frozenset(text.lower().replace(",", " ").split())
    if wrong := sorted(name for name in names if not re.fullmatch(r"[a-z0-9_.-]+", name)):
        raise ValueError(f"{', '.join(wrong)}: must be names of hosts, without port")
    return names


def _pools(text: str) -> tuple[PoolRange, ...]:
    ranges = tuple(map(_pool_range, text.replace(",", " ").split()))
    for index, one in enumerate(ranges):
        for other in ranges[:index]:
            if one.base.version == other.base.version and one.base.overlaps(other.base):
                raise ValueError(f"{one.base} overlaps {other.base}")
    return ranges


def _pool_range(text: str) -> PoolRange:
    base_text, separator, size_text = text.rpartition(":")
    if not separator or not size_text.isdigit():
        raise ValueError(f"{text}: must be RANGE:SIZE, for example 10.64.0.0/10:24")
    base, size = ip_network(base_text), int(size_text)
    if not base.prefixlen <= size <= base.max_prefixlen - 2:
        raise ValueError(f"{text}: the size must be from {base.prefixlen} to {base.max_prefixlen - 2}")
    return PoolRange(base, size)


SETTINGS: dict[str, Setting] = {
    "socket": Setting(
        "/run/docker/plugins/weft.sock", _path, "where the engine finds the driver; its name is the file's"
    ),
    "run": Setting("/run/docker/weft", _path, "run-time folder: the data-plane namespace and the lock"),
    "state": Setting(
        "/var/lib/weft",
        _path,
        "what must survive a reboot: the host's identity, and a snapshot of what it knows of the cluster",
    ),
    "store": Setting(
        "sqlite:///var/lib/weft/weft.db",
        _store,
        "the store that hosts share: that, or etcd 3.4 to 3.6 as etcd://host:2379,host:2379[/root], with TLS etcds://…",
    ),
    "store_ca": Setting(
        "", _path_or_none, "file with the CA that signed etcd's certificates (default: the public ones)"
    ),
    "store_cert": Setting(
        "", _path_or_none, "file with this host's client certificate for etcd; without a CN if etcd has users"
    ),
    "store_key": Setting("", _path_or_none, "file with its key"),
    "store_user": Setting("", str, "etcd user; its role needs readwrite --prefix=true /weft/v1"),
    "store_password_file": Setting("", _path_or_none, "file with that user's password, read at each login"),
    "hostname": Setting("", _hostname, "this host's name in messages and lists (default: the host's own)"),
    "underlay": Setting(
        "",
        str,
        "VTEP address: an interface, an address or a CIDR (default: from the route to other hosts or the store)",
    ),
    "underlay_family": Setting(
        "auto",
        _family,
        "ipv4 or ipv6: of the VTEP addresses, the same on all hosts; auto: as the other hosts, else IPv4 before IPv6",
    ),
    "port": Setting("4789", _port, "UDP port of VXLAN, the same on all hosts"),
    "wg_port": Setting("51820", _port, "UDP port of WireGuard on this host, for encrypted networks"),
    "wg_pool": Setting(
        "auto",
        _wg_pool,
        "range of WireGuard's addresses, the same on all hosts, that overlaps no route of this host; "
        f"auto: {WIREGUARD_POOL}, whatever routes there are",
    ),
    "allow_plain_store": Setting(
        "off", _switch, "on: encrypted networks although etcd is reached without TLS; who can write it can read them"
    ),
    "key_rotation": Setting("off", _rotation, "days after which this host's WireGuard key is replaced; or off"),
    "pools": Setting(
        "10.64.0.0/10:24 fdf7:7765:6674::/48:64", _pools, "ranges and sizes of pools when no --subnet is given"
    ),
    "docker": Setting(
        "unix:///var/run/docker.sock", _docker, "the local Docker API, for networks of other hosts and clean-up; or off"
    ),
    "driver": Setting("weft", str, "the name users type after -d (a managed plugin: weft:latest)"),
    "scope": Setting("local", _scope, "global: networks are Docker Swarm's (managed plugin only); or local"),
    "dns": Setting(
        RESOLVER, _dns, "IPv4 address at which containers ask for names of other hosts (see weft setup dns); or off"
    ),
    "listen": Setting(
        "off", _listen, "address:port for metrics, health and a page, read-only (such as 127.0.0.1:9789); or off"
    ),
    "listen_names": Setting(
        "", _names, "further names, by commas, under which that is asked for; addresses always work"
    ),
    "mirror": Setting("on", _switch, "on: a network that is created or removed on one host is so on all; or off"),
    "resync": Setting("30", _seconds, "seconds between full comparisons of kernel and store"),
    "probe_interval": Setting(
        "30", _interval, "seconds between probes of the network to some other hosts; 0: only when asked (weft doctor)"
    ),
    "gc_grace": Setting("10", _seconds, "seconds that Docker must not know an object before it is collected"),
    "host_grace": Setting(
        "600", _seconds, "seconds that a host must be silent, and answer no ping, before what it has is collected"
    ),
    "log": Setting("info", _levels, "debug, info, warning or error; of single modules: info,agent=debug"),
    "log_format": Setting("text", _format, "text, or json: each line of the log is a JSON object"),
}

assert set(SETTINGS) == {field.name for field in fields(Settings)}
