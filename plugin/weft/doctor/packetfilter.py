"""Whether this host's packet filters drop what other hosts send to a UDP port, and by which rule.

A walk through the rules as the kernel would do it, with what is known of the packet: UDP, its port, the address it
comes from, the device, a new connection. A condition on anything else is neither true nor false. Rules with such a
condition are passed over; if one of them might have let the packet through, the result is not `sure`.

nft's rules come as JSON (libnftables-json(5)), those of iptables as iptables-save writes them. Every table that hooks
in is asked on its own: "accept" ends only that one, "drop" ends all (nft(8), "verdict statements").
"""

from __future__ import annotations

import json
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

_HOOKS = {False: ("ingress", "prerouting", "input"), True: ("output", "postrouting")}
_DEPTH = 16
"""The kernel's own limit of nested chains."""
_OF_IPTABLES = ("raw", "mangle", "nat", "filter", "security")
_ZONE = "filter_IN_"
"""What names of firewalld's chains for a zone's incoming packets begin with."""
_SILENT = ("counter", "log", "comment", "notrack", "mangle", "xt_comment")
_ENDS = {"accept": "accept", "drop": "drop", "reject": "drop", "queue": "accept", "return": "return"}


@dataclass(frozen=True, slots=True)
class Packet:
    """
    :param outgoing: this host sends it.
    :param peer: address of the other host.
    :param device: by which it comes or goes.
    """

    port: int
    outgoing: bool
    peer: str
    device: str

    @property
    def version(self) -> int:
        return ip_address(self.peer).version


@dataclass(frozen=True, slots=True)
class Drop:
    """A rule, or a policy, that drops a packet.

    :param where: table and chain.
    :param rule: as its program shows it, or nearly so.
    :param repair: the command that lets such packets through.
    :param sure: no other rule before it, which could not be understood, may let the packet through.
    """

    where: str
    rule: str
    repair: str
    sure: bool = True


@dataclass(slots=True)
class _Rule:
    """:param matches: None if that is not known. :param verdict: accept, drop, return, jump, goto or "" (goes on)."""

    matches: bool | None
    verdict: str
    text: str
    target: str = ""


@dataclass(slots=True)
class _Chain:
    name: str
    hook: str = ""
    policy: str = "accept"
    priority: int = 0
    rules: list[_Rule] = field(default_factory=list)


def nft_drop(ruleset: str, packet: Packet, *, without: Iterable[str] = ()) -> Drop | None:
    """:param ruleset: `nft -j list ruleset`. :param without: tables of family ip or ip6 that iptables shows better."""
    objects = json.loads(ruleset)["nftables"]
    sets = {
        (one["family"], one["table"], one["name"]): one.get("elem", [])
        for kind in objects
        for one in [kind.get("set") or kind.get("map")]
        if one
    }
    families = {"inet", "netdev", "ip" if packet.version == 4 else "ip6"}
    skipped = {(family, table) for family in ("ip", "ip6") for table in without}
    tables: dict[tuple[str, str], dict[str, _Chain]] = {}
    for one in objects:
        for kind in ("chain", "rule"):
            if (found := one.get(kind)) and found["family"] in families:
                place = found["family"], found["table"]
                chains = tables.setdefault(place, {}) if place not in skipped else {}
                if kind == "chain":
                    hooked = found.get("dev", packet.device) == packet.device
                    hook = found.get("hook", "") if hooked else ""
                    policy, priority = found.get("policy", "accept"), found.get("prio", 0)
                    chains[found["name"]] = _Chain(found["name"], hook, policy, priority)
                elif found["chain"] in chains:
                    reader = _Nft(packet, {name: sets[f, t, name] for f, t, name in sets if (f, t) == place})
                    chains[found["chain"]].rules.append(reader.rule(found.get("expr", ())))
    for hook in _HOOKS[packet.outgoing]:
        for (family, table), chains in tables.items():
            for chain in sorted((c for c in chains.values() if c.hook == hook), key=lambda c: c.priority):
                if drop := _walk(chain, chains):
                    inner, rule, sure = drop
                    repair = f"nft insert rule {family} {table} {chain.name} udp dport {packet.port} accept"
                    if table == "firewalld":
                        zone = f" --zone={inner.removeprefix(_ZONE)}" if inner.startswith(_ZONE) else ""
                        opened = f"--permanent{zone} --add-port={packet.port}/udp"
                        repair = f"firewall-cmd {opened} && firewall-cmd --reload"
                    return Drop(f"nft table {family} {table}, chain {chain.name}", rule, repair, sure)
    return None


def iptables_tables(saved: str) -> list[str]:
    """Names of the tables in `iptables-save` that nft would show as well, in words of its own."""
    return [line[1:] for line in saved.splitlines() if line[:1] == "*"] if "(nf_tables)" in saved else []


def iptables_drop(saved: str, packet: Packet, program: str = "iptables") -> Drop | None:
    """:param saved: what `iptables-save`, or ip6tables-save, prints."""
    tables: dict[str, dict[str, _Chain]] = {}
    chains: dict[str, _Chain] = {}
    for line in saved.splitlines():
        if line[:1] == "*":
            chains = tables.setdefault(line[1:].strip(), {})
        elif line[:1] == ":":
            name, policy = line[1:].split()[:2]
            chains[name] = _Chain(name, "" if policy == "-" else name.lower(), "drop" if policy == "DROP" else "accept")
        elif line.startswith("-A "):
            words = shlex.split(line)
            chains[words[1]].rules.append(_iptables_rule(words[2:], packet, line, chains))
    for hook in _HOOKS[packet.outgoing]:
        for table in _OF_IPTABLES:
            for chain in tables.get(table, {}).values():
                if chain.hook == hook and (drop := _walk(chain, tables[table])):
                    _, rule, sure = drop
                    option = "" if table == "filter" else f"-t {table} "
                    repair = f"{program} {option}-I {chain.name} -p udp --dport {packet.port} -j ACCEPT"
                    if any(name.startswith("ufw-") for name in tables[table]):
                        repair = f"ufw allow {'out ' if packet.outgoing else ''}{packet.port}/udp"
                    return Drop(f"{program} table {table}, chain {chain.name}", rule, repair, sure)
    return None


def _walk(base: _Chain, chains: Mapping[str, _Chain]) -> tuple[str, str, bool] | None:
    """Chain and text of the rule that drops the packet, and whether that is sure; None if it gets through."""
    sure = True

    def through(chain: _Chain, depth: int) -> tuple[str, str, str]:
        """The verdict ("" if there is none), the chain and the rule that gave it."""
        nonlocal sure
        for rule in chain.rules:
            if rule.matches is None and rule.verdict in ("accept", "jump", "goto", "return"):
                sure = False
            if not rule.matches or not rule.verdict:
                continue
            if rule.verdict in ("jump", "goto"):
                found = through(chains[rule.target], depth + 1) if depth < _DEPTH else ("", "", "")
                if found[0] or rule.verdict == "goto":
                    return found
            elif rule.verdict == "return":
                return "", "", ""
            else:
                return rule.verdict, chain.name, rule.text
        return "", "", ""

    verdict, where, text = through(base, 0)
    if not verdict:
        verdict, where, text = base.policy, base.name, f"policy {base.policy}"
    return (where, text, sure) if verdict == "drop" else None


# nft


@dataclass(slots=True)
class _Nft:
    """Reads the rules of one table. `sets` are the elements of its named sets and maps."""

    packet: Packet
    sets: Mapping[str, Sequence[Any]]

    def rule(self, expressions: Sequence[Mapping[str, Any]]) -> _Rule:
        matches: bool | None = True
        verdict = target = ""
        texts = []
        for expression in expressions:
            ((kind, body),) = expression.items()
            if kind == "match":
                matches = _and(matches, self._match(body))
                texts.append(_shown(body))
            elif kind in _ENDS:
                verdict = _ENDS[kind]
                texts.append(kind)
            elif kind in ("jump", "goto"):
                verdict, target = kind, body["target"]
            elif kind == "vmap":
                known, verdict, target = self._choice(body)
                matches = _and(matches, known)
            elif kind not in _SILENT:
                matches = _and(matches, None)
        return _Rule(matches, verdict, " ".join(texts), target)

    def _choice(self, body: Mapping[str, Any]) -> tuple[bool | None, str, str]:
        value = self._value(body["key"])
        data = body["data"]
        pairs = self.sets.get(data[1:], ()) if isinstance(data, str) else data.get("set", ())
        if value is None:
            return None, "jump", ""
        for key, chosen in pairs:
            if self._equal(value, key):
                ((kind, where),) = chosen.items()
                return True, _ENDS.get(kind, kind), (where or {}).get("target", "")
        return False, "", ""

    def _match(self, body: Mapping[str, Any]) -> bool | None:
        value, right, operation = self._value(body["left"]), body["right"], body["op"]
        if value is None:
            return None
        if operation in ("==", "in", "!="):
            equal = self._equal(value, right)
            return None if equal is None else equal != (operation == "!=")
        if isinstance(value, int) and isinstance(right, int):
            return {"<": value < right, ">": value > right, "<=": value <= right, ">=": value >= right}.get(operation)
        return None

    def _value(self, left: Any) -> Any:
        """What the packet has there; None if that is not known, () if it cannot have it."""
        packet = self.packet
        if not isinstance(left, dict):
            return None
        match left:
            case {"payload": {"protocol": "udp" | "th", "field": "dport"}}:
                return packet.port
            case {"payload": {"protocol": "tcp" | "icmp" | "icmpv6" | "sctp" | "dccp"}}:
                return ()
            case {"payload": {"protocol": "ip" | "ip6" as protocol, "field": field}}:
                if (protocol == "ip6") != (packet.version == 6):
                    return ()
                far = "daddr" if packet.outgoing else "saddr"
                return {far: packet.peer, "protocol": "udp", "nexthdr": "udp"}.get(field)
            case {"meta": {"key": "l4proto"}}:
                return "udp"
            case {"meta": {"key": "nfproto"}}:
                return f"ipv{packet.version}"
            case {"meta": {"key": "protocol"}}:
                return "ip" if packet.version == 4 else "ip6"
            case {"meta": {"key": "iifname" | "iif"}}:
                return () if packet.outgoing else packet.device
            case {"meta": {"key": "oifname" | "oif"}}:
                return packet.device if packet.outgoing else ()
            case {"ct": {"key": "state"}}:
                return "new"
            case {"ct": {"key": "status"}}:
                return ()  # nobody has translated its address
            case {"fib": {"result": "type", "flags": "daddr" | ["daddr"]}}:
                return "unicast" if packet.outgoing else "local"
        return None

    def _equal(self, value: Any, right: Any) -> bool | None:
        if value == ():
            return False
        match right:
            case str() if right.startswith("@"):
                return self._one_of(value, self.sets[right[1:]]) if right[1:] in self.sets else None
            case {"set": elements} | list(elements):
                return self._one_of(value, elements)
            case {"elem": {"val": one}}:
                return self._equal(value, one)
            case {"range": [low, high]}:
                return low <= value <= high if isinstance(value, int) and isinstance(low, int) else None
            case {"prefix": {"addr": address, "len": length}}:
                return ip_address(value) in ip_network(f"{address}/{length}", strict=False)
            case str() if right.endswith("*"):
                return str(value).startswith(right[:-1])
            case str() | int():
                return bool(str(value) == str(right)) or (value, right) == ("udp", 17)
        return None

    def _one_of(self, value: Any, elements: Iterable[Any]) -> bool | None:
        found = [self._equal(value, one) for one in elements]
        return True if True in found else None if None in found else False


def _and(one: bool | None, other: bool | None) -> bool | None:
    return False if False in (one, other) else None if None in (one, other) else True


def _shown(match: Mapping[str, Any]) -> str:
    """A condition about as nft writes it."""
    left, operation = match["left"], match["op"]
    texts = [str(one) for one in _leaves(left)]
    right = match["right"]
    right = "{ " + ", ".join(map(_leaf, right["set"])) + " }" if isinstance(right, dict) and "set" in right else right
    return " ".join([*texts, *([] if operation in ("==", "in") else [operation]), _leaf(right)])


def _leaf(value: Any) -> str:
    match value:
        case {"range": [low, high]}:
            return f"{low}-{high}"
        case {"prefix": {"addr": address, "len": length}}:
            return f"{address}/{length}"
        case list():
            return ",".join(map(_leaf, value))
    return str(value)


def _leaves(left: Any) -> Iterator[Any]:
    match left:
        case {"payload": {"protocol": protocol, "field": field}}:
            yield from (protocol, field)
        case {"meta": {"key": key}}:
            yield key
        case {"ct": {"key": key}}:
            yield from ("ct", key)
        case _:
            yield "..."


# iptables


def _iptables_rule(words: Sequence[str], packet: Packet, text: str, chains: Iterable[str]) -> _Rule:
    """:param chains: names of the table's own ones."""
    matches: bool | None = True
    verdict = target = ""
    negated = False
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word == "!":
            negated = True
            continue
        if not word.startswith("-"):
            continue
        if word in ("-m", "--comment", "--reject-with", "--log-prefix", "--log-level"):
            rest.popleft()
        elif word in ("-j", "-g"):
            target = rest.popleft()
            verdict = _ENDS.get(target.lower(), "")
            if target in chains:
                verdict = "jump" if word == "-j" else "goto"
        else:
            alone = not rest or rest[0] == "!" or rest[0].startswith("-")  # such as --rsource
            matches = _and(matches, _negate(_iptables_match(word, "" if alone else rest.popleft(), packet), negated))
        negated = False
    return _Rule(matches, verdict, text, target)


def _negate(value: bool | None, negated: bool) -> bool | None:
    return value if value is None or not negated else not value


def _iptables_match(option: str, value: str, packet: Packet) -> bool | None:
    far = "-d" if packet.outgoing else "-s"
    match option:
        case "-p":
            return value in ("udp", "17", "all")
        case "--dport" | "--dports" | "--destination-port":
            return any(_in_range(packet.port, one) for one in value.split(","))
        case "-i" | "-o":
            if (option == "-o") != packet.outgoing:
                return False
            return packet.device.startswith(value[:-1]) if value.endswith("+") else value == packet.device
        case "-s" | "-d" if option == far:
            return ip_address(packet.peer) in ip_network(value, strict=False)
        case "--dst-type":
            return ("UNICAST" if packet.outgoing else "LOCAL") in value.split(",")
        case "--ctstate" | "--state":
            return "NEW" in value.split(",")
    return None


def _in_range(port: int, text: str) -> bool:
    low, separator, high = text.partition(":")
    return int(low or 0) <= port <= int(high or 65535) if separator else port == int(low)
