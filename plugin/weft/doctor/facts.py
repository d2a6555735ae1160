"""What a host knows of itself, and how others learn of it: the values that the doctor judges.

`Facts` are what this host sees when it looks. `Report` is what it tells the others, in the store: what only they can
judge, and the findings that it has made itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from weft.doctor.findings import Finding
from weft.doctor.packetfilter import Drop
from weft.errors import Unreadable
from weft.store import Health

PROBED = "/probed"
"""What the key of a report ends with if it only says that its host has probed the others."""


@dataclass(frozen=True, slots=True)
class PortDrop:
    """This host's own packet filter drops a UDP port: what others send it, or what it sends.

    :param network: whose port that is; "": that of all that have none of their own.
    """

    port: int
    outgoing: bool
    drop: Drop
    network: str = ""


@dataclass(frozen=True, slots=True)
class Switch:
    """A kernel setting that is otherwise than it must be. `place`: in which namespace, "" for the host's own."""

    name: str
    value: str
    wanted: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Every text that names a problem is "" if there is none. None: it could not be found out.

    :param name: this host's.
    :param daemon: why weft does not serve here.
    :param registered: why this host is not among the others; that may be a consequence of the store's problem.
    :param underlay: the VTEP address that the others have of it; `device` holds it ("" if none does), with `mtu`.
    :param towards: the address from which this host sends to the others, by its routes; "" if it has none.
    :param drops: of the ports of VXLAN, also those of networks in use here, and, if it is used, of WireGuard.
    :param users: by UDP port, which program has it instead of the kernel.
    :param networks: which of them have such a UDP port of their own.
    :param refused: what the kernel refused because a program has a port, be it one that we do not see.
    :param kernel: what it cannot make.
    :param mounts: why the data plane would not outlive weft, or is not there.
    :param dns: what Docker's configuration lacks for names of other hosts.
    :param resolver: why it does not answer.
    :param filtered: containers do not reach the resolver.
    :param encryption: why encrypted networks do not work here.
    :param intruders: links beside the WireGuard device.
    :param drift: what is otherwise in the kernel than it should be; `unmended`: why it stays so, if that is known.
    :param orphans: what the store has of this host and its Docker has not.
    :param conflicts: networks of Docker that cannot be as the cluster has them.
    :param listener: why WEFT_LISTEN is not listened on.
    """

    name: str
    port: int
    wg_port: int = 0
    resolver_address: str = ""
    daemon: str = ""
    registered: str = ""
    underlay: str = ""
    device: str = ""
    mtu: int = 0
    towards: str = ""
    drops: tuple[PortDrop, ...] = ()
    users: Mapping[int, str] = field(default_factory=dict)
    networks: Mapping[int, str] = field(default_factory=dict)
    refused: str = ""
    kernel: str = ""
    switches: tuple[Switch, ...] = ()
    mounts: str = ""
    dns: str = ""
    resolver: str = ""
    filtered: bool | None = None
    store: Health = field(default_factory=Health)
    engine: str = ""
    encryption: str = ""
    intruders: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()
    unmended: str = ""
    orphans: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    listener: str = ""


@dataclass(frozen=True, slots=True)
class Peering:
    """A WireGuard peer as a host has it: seconds since the last handshake (None: there was none), bytes both ways."""

    age: float | None
    received: int
    sent: int

    @property
    def unanswered(self) -> bool:
        return self.age is None and self.sent > 0


@dataclass(frozen=True, slots=True)
class Report:
    """
    :param host: id of the one who tells.
    :param question: which one it answers.
    :param time: of its clock, Unix time.
    :param tunnel_key: of its WireGuard device; "" if it has none.
    :param peerings: by public key; of many those that matter.
    :param unpeered: keys that other hosts have published and that are no peers of it.
    :param reached: by id of another host, whether that answered a ping to its VTEP address; who is missing was not
        asked.
    :param findings: its own ones, but for `drops`, which probes may refute.
    """

    host: str
    name: str
    question: str
    time: float
    version: str
    underlay: str = ""
    device: str = ""
    mtu: int = 0
    towards: str = ""
    tunnel_key: str = ""
    peerings: Mapping[str, Peering] = field(default_factory=dict)
    unpeered: tuple[str, ...] = ()
    reached: Mapping[str, bool] = field(default_factory=dict)
    drops: tuple[PortDrop, ...] = ()
    findings: tuple[Finding, ...] = ()

    def encode(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> Self:
        """`Unreadable` if it is none. Fields that a newer weft added are ignored."""
        try:
            values = {name: value for name, value in json.loads(text).items() if name in cls.__dataclass_fields__}
            values["drops"] = tuple(
                PortDrop(one["port"], one["outgoing"], Drop(**one["drop"]), one.get("network", ""))
                for one in values.get("drops", ())
            )
            values["findings"] = tuple(
                Finding(**{**one, "hosts": tuple(one["hosts"])}) for one in values.get("findings", ())
            )
            values["unpeered"] = tuple(values.get("unpeered", ()))
            values["peerings"] = {key: Peering(**one) for key, one in values.get("peerings", {}).items()}
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Unreadable(f"a host's report cannot be read: {error}") from error
