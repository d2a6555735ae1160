"""Rulesets as nft and iptables print them, and which rule drops VXLAN."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weft.doctor.packetfilter import Packet, iptables_drop, iptables_tables, nft_drop

VXLAN = Packet(4789, False, "192.168.78.2", "eth0")
SENT = Packet(4789, True, "192.168.78.2", "eth0")


def match(left: dict[str, Any], right: Any, operation: str = "==") -> dict[str, Any]:
    return {"match": {"op": operation, "left": left, "right": right}}


DPORT = {"payload": {"protocol": "udp", "field": "dport"}}
IIF = {"meta": {"key": "iifname"}}
STATE = match({"ct": {"key": "state"}}, ["established", "related"], "in")
SADDR = {"payload": {"protocol": "ip", "field": "saddr"}}


def ruleset(*rules: Any, policy: str = "accept", hook: str = "input", table: str = "f", more: Any = ()) -> str:
    place = {"family": "inet", "table": table}
    chain = {"chain": {**place, "name": "in", "hook": hook, "prio": 0, "policy": policy}}
    made = [{"rule": {**place, "chain": "in", "expr": list(rule)}} for rule in rules]
    return json.dumps({"nftables": [{"metainfo": {}}, *more, chain, *made]})


DROP = {"drop": None}
ACCEPT = {"accept": None}


@pytest.mark.parametrize(
    ("rules", "policy", "dropped"),
    [
        ([], "accept", False),
        ([], "drop", True),
        ([[match(DPORT, 4789), ACCEPT]], "drop", False),
        ([[match(DPORT, 4789), {"counter": {}}, DROP]], "accept", True),
        ([[match(DPORT, 8472), DROP]], "accept", False),
        ([[match(DPORT, 4789, "!="), ACCEPT]], "drop", True),
        ([[match(DPORT, {"set": [53, {"range": [4000, 5000]}]}), DROP]], "accept", True),
        ([[match({"payload": {"protocol": "tcp", "field": "dport"}}, 4789), DROP]], "accept", False),
        ([[STATE, ACCEPT]], "drop", True),
        ([[match(IIF, "lo"), ACCEPT]], "drop", True),
        ([[match(IIF, "eth*"), ACCEPT]], "drop", False),
        ([[match(SADDR, {"prefix": {"addr": "192.168.78.0", "len": 24}}), ACCEPT]], "drop", False),
        ([[match(SADDR, "192.168.78.3"), ACCEPT]], "drop", True),
        ([[match(DPORT, 4789), {"reject": {"type": "icmp"}}]], "accept", True),
        ([[match(DPORT, 4789), ACCEPT], [DROP]], "accept", False),
        ([[match({"meta": {"key": "l4proto"}}, "tcp"), DROP]], "accept", False),
        ([[match({"meta": {"key": "l4proto"}}, 17), DROP]], "accept", True),
    ],
)
def test_what_nft_drops(rules: list[list[dict[str, Any]]], policy: str, dropped: bool) -> None:
    assert bool(nft_drop(ruleset(*rules, policy=policy), VXLAN)) is dropped


def test_what_is_named_can_be_typed() -> None:
    drop = nft_drop(ruleset([match(DPORT, 4789), DROP]), VXLAN)
    assert drop is not None
    assert drop.where == "nft table inet f, chain in"
    assert drop.rule == "udp dport 4789 drop"
    assert drop.repair == "nft insert rule inet f in udp dport 4789 accept"
    assert drop.sure


def test_a_rule_that_is_not_understood_leaves_a_doubt() -> None:
    unknown = [match({"meta": {"key": "mark"}}, 7), ACCEPT]
    drop = nft_drop(ruleset(unknown, [match(DPORT, 4789), DROP]), VXLAN)
    assert drop is not None
    assert not drop.sure
    doubtful = [match({"meta": {"key": "mark"}}, 7), DROP]
    assert nft_drop(ruleset(doubtful), VXLAN) is None


def test_named_sets_verdict_maps_and_chains() -> None:
    place = {"family": "inet", "table": "f"}
    ports = {"set": {**place, "name": "open", "elem": [22, 4789]}}
    zone = {"chain": {**place, "name": "zone"}}
    jump = [{"vmap": {"key": IIF, "data": {"set": [["eth0", {"goto": {"target": "zone"}}]]}}}]
    closed = {"rule": {**place, "chain": "zone", "expr": [match(DPORT, "@open"), DROP]}}
    assert nft_drop(ruleset([match(DPORT, "@open"), ACCEPT], policy="drop", more=[ports]), VXLAN) is None
    assert nft_drop(ruleset(jump, more=[ports, zone, closed]), VXLAN)


def test_firewalld_is_told_by_its_own_command() -> None:
    drop = nft_drop(ruleset([{"reject": {}}], table="firewalld"), VXLAN)
    assert drop
    assert drop.repair == "firewall-cmd --permanent --add-port=4789/udp && firewall-cmd --reload"


def test_firewalld_is_told_the_zone_of_the_device() -> None:
    """Which need not be the default one, that it would open without."""
    place = {"family": "inet", "table": "firewalld"}
    zones = [
        {"chain": {**place, "name": "zones"}},
        {"chain": {**place, "name": "filter_IN_internal"}},
        {"rule": {**place, "chain": "zones", "expr": [match(IIF, "eth0"), {"goto": {"target": "filter_IN_internal"}}]}},
        {"rule": {**place, "chain": "filter_IN_internal", "expr": [{"reject": {}}]}},
    ]
    drop = nft_drop(ruleset([{"jump": {"target": "zones"}}], table="firewalld", more=zones), VXLAN)
    assert drop
    assert drop.repair == "firewall-cmd --permanent --zone=internal --add-port=4789/udp && firewall-cmd --reload"


def test_what_docker_asks_of_an_address_is_understood() -> None:
    """As in the nftables mode of Engine 29: a packet to this host is for a local address."""
    local = match({"fib": {"result": "type", "flags": "daddr"}}, "local")
    assert nft_drop(ruleset([local, DROP]), VXLAN)
    assert not nft_drop(ruleset([local, DROP], hook="output"), SENT)
    drop = nft_drop(ruleset([match({"ct": {"key": "status"}}, "dnat", "in"), ACCEPT], [DROP]), VXLAN)
    assert drop
    assert drop.sure


def test_what_is_sent_meets_other_chains() -> None:
    text = ruleset([match(DPORT, 4789), DROP], hook="output")
    assert nft_drop(text, VXLAN) is None
    assert nft_drop(text, SENT)


IPTABLES = """# Generated by iptables-save v1.8.9 (nf_tables) on Wed Nov 25 23:27:01 2026
*filter
:INPUT {policy} [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:{chain} - [0:0]
{rules}
COMMIT
"""


@pytest.mark.parametrize(
    ("rules", "policy", "dropped"),
    [
        ("", "ACCEPT", False),
        ("", "DROP", True),
        ("-A INPUT -p udp -m udp --dport 4789 -j DROP", "ACCEPT", True),
        ("-A INPUT -p tcp -m tcp --dport 4789 -j DROP", "ACCEPT", False),
        ("-A INPUT ! -i lo -p udp -m multiport --dports 53,4000:5000 -j REJECT", "ACCEPT", True),
        ("-A INPUT ! -i eth0 -j DROP", "ACCEPT", False),
        ("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "DROP", True),
        ("-A INPUT -s 192.168.78.0/24 -i eth+ -j ACCEPT", "DROP", False),
        ('-A INPUT -m comment --comment "not -j DROP" -j LOGS\n-A LOGS -p udp -j DROP', "ACCEPT", True),
        ("-A INPUT -j LOGS\n-A LOGS -p udp -j RETURN\n-A LOGS -j DROP", "ACCEPT", False),
        ("-A INPUT -j LOGS\n-A LOGS -m addrtype --dst-type LOCAL -j RETURN\n-A LOGS -j DROP", "ACCEPT", False),
    ],
)
def test_what_iptables_drops(rules: str, policy: str, dropped: bool) -> None:
    assert bool(iptables_drop(IPTABLES.format(rules=rules, policy=policy, chain="LOGS"), VXLAN)) is dropped


@pytest.mark.parametrize(
    "matches",
    [
        "-m recent --rcheck --seconds 60 --name W --mask 255.255.255.255 --rsource",
        "-m addrtype --dst-type LOCAL --limit-iface-in",
        "-m addrtype --limit-iface-in ! -i lo",
        "-m set --match-set vteps src",
    ],
)
def test_a_verdict_after_an_option_without_a_value_leaves_a_doubt(matches: str) -> None:
    """Of these rules we do not know whether they let our packets in."""
    rule = f"-A INPUT {matches} -j ACCEPT"
    drop = iptables_drop(IPTABLES.format(rules=rule, policy="DROP", chain="LOGS"), VXLAN)
    assert drop
    assert (drop.rule, drop.sure) == ("policy drop", False)


def test_the_command_for_iptables_and_ufw() -> None:
    rule = "-A INPUT -p udp -m udp --dport 4789 -j DROP"
    drop = iptables_drop(IPTABLES.format(rules=rule, policy="ACCEPT", chain="LOGS"), VXLAN)
    assert drop
    assert drop.rule == rule
    assert drop.repair == "iptables -I INPUT -p udp --dport 4789 -j ACCEPT"
    drop = iptables_drop(IPTABLES.format(rules="", policy="DROP", chain="ufw-before-input"), VXLAN)
    assert drop
    assert drop.repair == "ufw allow 4789/udp"


def test_tables_of_iptables_are_not_read_twice() -> None:
    saved = IPTABLES.format(rules="", policy="ACCEPT", chain="LOGS")
    assert iptables_tables(saved) == ["filter"]
    assert iptables_tables(saved.replace("nf_tables", "legacy")) == []
