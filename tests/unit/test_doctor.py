"""The doctor's judgement: of every fault the root is named, once, and no consequence of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from weft.doctor.facts import Facts, Peering, PortDrop, Report, Switch
from weft.doctor.findings import Finding
from weft.doctor.local import of_host
from weft.doctor.packetfilter import Drop
from weft.doctor.verdict import CHECKS, Examination, examine
from weft.doctor.view import PoolUse, View
from weft.errors import Unreadable
from weft.model import Host
from weft.probes.links import Kind, ProbeLink
from weft.store import Health

NOW = 1_000_000.0
H1, H2, H3 = "id-h1", "id-h2", "id-h3"
IDS = (H1, H2, H3)
HOSTS = {
    host: Host(host, host[3:], f"192.168.78.{n}", "0.1.0", f"key-{host}", f"100.64.0.{n}", 51820)
    for n, host in enumerate(IDS, 1)
}
WAYS = [(a, b) for a in IDS for b in IDS if a != b]


def link(way: tuple[str, str], kind: Kind = "plain", **values: Any) -> ProbeLink:
    return ProbeLink(*way, kind, 1450, NOW, **{"small": 0.0, "full": 0.0, "offloaded": 0.0, "mtu": 1450, **values})


def lost(*ways: tuple[str, str], kind: Kind = "plain") -> list[ProbeLink]:
    return [link(way, kind, small=1.0, full=1.0, offloaded=1.0, mtu=None) for way in ways]


def links(changed: Iterable[ProbeLink] = (), encrypted: bool = False) -> list[ProbeLink]:
    kinds: list[Kind] = ["plain", "encrypted"] if encrypted else ["plain"]
    found = {one.key: one for one in (link(way, kind) for way in WAYS for kind in kinds)}
    return list({**found, **{one.key: one for one in changed}}.values())


def report(host: str, **values: Any) -> Report:
    record = HOSTS[host]
    base = {
        "question": "q",
        "time": NOW,
        "version": "0.1.0",
        "underlay": record.underlay,
        "device": "eth0",
        "mtu": 1500,
        "towards": record.underlay,
        "tunnel_key": record.wg_key,
        "peerings": {one.wg_key: Peering(20.0, 1000, 1000) for one in HOSTS.values() if one is not record},
        "reached": dict.fromkeys(set(IDS) - {host}, True),
    }
    return Report(host, record.name, **{**base, **values})


def view(
    *changed: Report,
    measured: Sequence[ProbeLink] | None = None,
    silent: Sequence[str] = (),
    hosts: dict[str, Host] | None = None,
    **values: Any,
) -> View:
    known = hosts or HOSTS
    reports = {host: report(host) for host in known if host in HOSTS and host not in silent}
    reports.update((one.host, one) for one in changed)
    base: dict[str, Any] = {"waits": dict.fromkeys(reports, (NOW - 0.2, NOW + 0.2))}
    return View(
        me=H1,
        hosts=known,
        alive=set(known) - set(silent),
        reports=reports,
        links=links() if measured is None else measured,
        **{**base, **values},
    )


def found(examined: Examination) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.check, one.hosts) for one in examined.findings]


def only(view: View) -> Finding:
    """The one finding."""
    findings = examine(view).findings
    assert len(findings) == 1, findings
    return findings[0]


def unreached(*hosts: str) -> list[Report]:
    """Reports in which pings do not reach these hosts, or reach nobody from them."""
    return [report(one, reached={other: not {one, other} & set(hosts) for other in IDS if other != one}) for one in IDS]


DROP = Drop("nft table inet f, chain input", "udp dport 4789 drop", "nft insert rule inet f input accept")


def test_a_healthy_cluster_has_no_fault() -> None:
    examined = examine(view(measured=links(encrypted=True)))
    assert examined.findings == ()
    assert examined.table == {name: dict.fromkeys(CHECKS, "ok") for name in ("h1", "h2", "h3")}


def test_without_probes_what_they_show_is_unknown() -> None:
    table = examine(view(measured=[])).table
    assert {check for check, value in table["h2"].items() if value == "unknown"} == {"path", "mtu", "checksum"}


def test_a_host_that_is_off_is_named_and_not_what_it_loses() -> None:
    reports = [report(host, reached={H2: False, **{o: True for o in (H1, H3) if o != host}}) for host in (H1, H3)]
    ways = [way for way in WAYS if H2 in way]
    one = only(view(*reports, measured=links(lost(*ways)), silent=[H2]))
    assert (one.check, one.hosts) == ("host", ("h2",))
    assert one.cause == "h2 is off, or cut off from all other hosts"
    assert "answers no ping of h1, h3" in one.evidence
    assert one.evidence.endswith("weft host forget h2")
    assert one.command == ""


def test_a_host_without_weft_still_answers_pings() -> None:
    one = only(view(silent=[H2]))
    assert one.cause == "h2 is up, but weft there does not run or does not reach the store"


def test_one_that_lives_but_does_not_answer_is_a_warning() -> None:
    examined = examine(replace(view(), reports={H1: report(H1), H3: report(H3)}))
    assert [(one.check, one.severity, one.hosts) for one in examined.findings] == [("host", "warning", ("h2",))]


def test_without_the_store_nothing_is_said_of_the_others() -> None:
    away = report(H1, findings=tuple(of_host(Facts("h1", 4789, store=Health("etcd cannot be used")))))
    assert only(replace(view(), reports={H1: away})).check == "store"


@pytest.mark.parametrize("outgoing", [False, True])
def test_a_packet_filter_is_the_root_of_what_is_lost(outgoing: bool) -> None:
    ways = [way for way in WAYS if way[0 if outgoing else 1] == H2]
    filtered = report(H2, drops=(PortDrop(4789, outgoing, DROP),))
    one = only(view(filtered, measured=links(lost(*ways))))
    assert (one.check, one.severity, one.hosts) == ("udp-port", "error", ("h2",))
    assert one.evidence == "nft table inet f, chain input: udp dport 4789 drop; probes are lost"
    assert one.command == DROP.repair


def test_probes_refute_a_rule_that_was_misread() -> None:
    assert examine(view(report(H2, drops=(PortDrop(4789, False, DROP),)))).findings == ()


def test_a_doubtful_rule_is_a_fault_only_if_probes_are_lost() -> None:
    doubtful = report(H2, drops=(PortDrop(4789, False, replace(DROP, sure=False)),))
    assert only(view(doubtful, measured=[])).severity == "warning"
    assert only(view(doubtful, measured=links(lost((H1, H2), (H3, H2))))).severity == "error"


def test_a_filter_on_the_way() -> None:
    one = only(view(measured=links(lost((H1, H2), (H2, H1)))))
    assert (one.check, one.hosts) == ("path", ("h1", "h2"))
    assert one.cause == "UDP port 4789 is dropped on the way between h1 and h2"
    assert "pings pass" in one.evidence


def test_one_way_only() -> None:
    one = only(view(measured=links(lost((H1, H2)))))
    assert one.cause == "UDP port 4789 is dropped on the way from h1 to h2, in this direction only"
    assert one.hosts == ("h1", "h2")


def test_what_nobody_attests_is_accounted_for_by_the_other_direction() -> None:
    silence = replace(lost((H1, H2))[0], attested=False)
    one = only(view(measured=links([silence, *lost((H2, H1))])))
    assert one.cause == "UDP port 4789 is dropped on the way between h1 and h2"


def test_the_underlay_between_two_hosts() -> None:
    cut = [report(H1, reached={H2: False, H3: True}), report(H2, reached={H1: False, H3: True})]
    one = only(view(*cut, measured=links(lost((H1, H2), (H2, H1)))))
    assert one.cause == "h1 and h2 do not reach each other: the underlay does not carry packets between them"


def test_a_host_that_is_cut_off_is_named_alone() -> None:
    ways = [way for way in WAYS if H2 in way]
    one = only(view(*unreached(H2), measured=links(lost(*ways))))
    assert (one.check, one.hosts) == ("path", ("h2",))
    assert one.cause.startswith("h2 is cut off")


def test_a_wrong_vtep_address_that_is_published() -> None:
    wrong = replace(HOSTS[H2], underlay="10.99.0.2")
    reports = unreached(H2)
    reports[1] = replace(reports[1], underlay="10.99.0.2")
    for ways in ([way for way in WAYS if H2 in way], [way for way in WAYS if way[1] == H2]):
        one = only(view(*reports, measured=links(lost(*ways)), hosts={**HOSTS, H2: wrong}))
        assert (one.check, one.hosts) == ("vtep", ("h2",))
        assert one.evidence.endswith("set WEFT_UNDERLAY=192.168.78.2 there and restart weft")


def test_two_hosts_with_one_vtep_address() -> None:
    twin = replace(HOSTS[H3], underlay=HOSTS[H2].underlay)
    one = only(view(hosts={**HOSTS, H3: twin}))
    assert (one.check, one.hosts) == ("vtep", ("h2", "h3"))


def narrow(*ways: tuple[str, str], mtu: int = 1350) -> list[ProbeLink]:
    return [link(way, full=1.0, mtu=mtu) for way in ways]


def test_a_path_that_is_too_narrow_says_what_fits() -> None:
    one = only(view(measured=links(narrow((H1, H2), (H2, H1)))))
    assert (one.check, one.hosts) == ("mtu", ("h1", "h2"))
    assert one.evidence.startswith("packets of 1500 bytes are lost and small ones pass; 1400 bytes fit; raise")
    assert one.command == "ip link set eth0 mtu 1400"
    assert "-o mtu=1350" in one.evidence


def test_an_interface_with_another_mtu() -> None:
    one = only(view(report(H2, mtu=1400), measured=links(narrow((H1, H2)))))
    assert one.cause == "the MTU of h2's underlay interface is 1400, that of h1's 1500"
    assert one.command == "ip link set eth0 mtu 1500"


def test_a_card_that_spoils_checksums() -> None:
    one = only(view(measured=links([link((H1, H2), offloaded=1.0)])))
    assert (one.check, one.hosts) == ("checksum", ("h1", "h2"))
    assert one.command.startswith("ethtool -K eth0 tx-udp_tnl")
    assert one.evidence.endswith("to be repaired on h1; networks made with -o tx-checksum=off do without the card's")
    assert only(view(measured=links([link((H1, H2), corrupt=4)]))).check == "checksum"


def test_a_narrow_way_to_one_host_is_said_once() -> None:
    ways = [way for way in WAYS if H3 in way]
    one = only(view(measured=links(narrow(*ways))))
    assert one.hosts == ("h3",)
    assert one.cause == "the path between h3 and the other hosts carries smaller packets than the networks send"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"full": 1.0}, "the path between {} and the other hosts carries smaller packets than the networks send"),
        ({"small": 1.0}, "{} is cut off: the underlay does not carry packets between it and the other hosts"),
    ],
)
def test_of_hosts_that_lost_all_no_pair_is_said_twice(values: dict[str, Any], named: str) -> None:
    """In a large cluster not all ways are measured: here, all those of h3 are said already when its turn comes."""
    faulty = [(a, b) for a, b in ((1, 2), (1, 3), (2, 3), (1, 4))]
    ways = [(f"id-h{a}", f"id-h{b}") for pair in faulty for a, b in (pair, pair[::-1])]
    measured = [*(link(way, **values) for way in ways), link(("id-h4", "id-h5"))]
    hosts = {f"id-h{n}": Host(f"id-h{n}", f"h{n}", f"192.168.78.{n}", "0.1.0") for n in range(1, 6)}
    reports = {
        host: Report(
            host, record.name, "q", NOW, "0.1.0", record.underlay, mtu=1500, reached=dict.fromkeys(hosts, False)
        )
        for host, record in hosts.items()
    }
    examined = examine(View(me="id-h5", hosts=hosts, alive=set(hosts), reports=reports, links=measured))
    assert [one.cause for one in examined.findings] == [named.format(host) for host in ("h1", "h2")]


@pytest.mark.parametrize(
    ("changed", "check", "cause"),
    [
        (lost(*WAYS), "path", "UDP port 4789 is dropped on the way between all hosts"),
        (narrow(*WAYS), "mtu", "the path between all hosts carries smaller packets than the networks send"),
        (
            lost(*WAYS, kind="encrypted"),
            "wireguard",
            "WireGuard gets no answer between all hosts: UDP port 51820 is dropped on the way",
        ),
    ],
)
def test_what_is_between_all_hosts_is_said_once(changed: list[ProbeLink], check: str, cause: str) -> None:
    one = only(view(measured=links(changed, encrypted=check == "wireguard")))
    assert (one.check, one.hosts, one.cause) == (check, ("h1", "h2", "h3"), cause)


def test_an_underlay_that_carries_nothing_at_all() -> None:
    one = only(view(*unreached(*IDS), measured=links(lost(*WAYS))))
    assert one.cause == "no host reaches another: the underlay does not carry packets between them"


def test_silence_one_way_and_an_attested_way_back() -> None:
    one = only(view(measured=links([replace(lost((H1, H2))[0], attested=False)])))
    assert one.cause == "UDP port 4789 is dropped on the way from h1 to h2, in this direction only"


def test_some_loss_is_a_warning() -> None:
    one = only(view(measured=links([link((H1, H2), small=0.2)])))
    assert (one.check, one.severity) == ("path", "warning")
    assert one.evidence.startswith("20% of the small probes were lost")


def test_another_program_explains_what_its_host_loses() -> None:
    facts = Facts("h2", 4789, underlay="192.168.78.2", device="eth0", users={4789: "named (pid 7)"}, drift=("make",))
    local = tuple(of_host(facts))
    ways = [way for way in WAYS if H2 in way]
    one = only(view(report(H2, findings=local), measured=links(lost(*ways))))
    assert one.cause == "UDP port 4789, which VXLAN needs, is used by named (pid 7)"


def test_a_fault_with_which_probes_still_arrive_explains_none_that_are_lost() -> None:
    facts = Facts("h2", 4789, underlay="192.168.78.2", device="eth0", users={4790: "x"}, networks={4790: "app"})
    dropped = PortDrop(4791, False, DROP, "db")
    filtered = report(H2, findings=tuple(of_host(facts)), drops=(dropped,))
    examined = examine(view(filtered, measured=links(lost((H1, H2), (H2, H1)))))
    assert found(examined) == [("udp-port", ("h2",)), ("udp-port", ("h2",)), ("path", ("h1", "h2"))]
    assert examined.findings[1].cause == "a packet filter of h2 drops UDP port 4791 of network db, incoming"


# Encrypted ways


def test_wireguard_dropped_on_the_way() -> None:
    silent = {HOSTS[H2].wg_key: Peering(None, 0, 500), HOSTS[H3].wg_key: Peering(9.0, 1, 1)}
    measured = links(lost((H1, H2), (H2, H1), kind="encrypted"), encrypted=True)
    one = only(view(report(H1, peerings=silent), measured=measured))
    assert (one.check, one.hosts) == ("wireguard", ("h1", "h2"))
    assert one.cause == "WireGuard gets no answer between h1 and h2: UDP port 51820 is dropped on the way"
    assert one.evidence.startswith("no handshake (there was none), while VXLAN in plain passes; open it between")


def test_wireguard_dropped_by_a_host() -> None:
    measured = links(lost(*[w for w in WAYS if H2 in w], kind="encrypted"), encrypted=True)
    one = only(view(report(H2, drops=(PortDrop(51820, False, DROP),)), measured=measured))
    assert (one.check, one.hosts) == ("udp-port", ("h2",))


def test_a_rule_against_wireguard_is_not_refuted_by_what_looks_like_answers() -> None:
    closed = PortDrop(51820, False, DROP)
    one = only(view(report(H2, drops=(closed,)), measured=links(encrypted=True)))
    assert (one.check, one.severity, one.hosts) == ("udp-port", "warning", ("h2",))
    assert "answers pass" in one.evidence
    doubtful = replace(closed, drop=replace(DROP, sure=False))
    assert not examine(view(report(H2, drops=(doubtful,)), measured=links(encrypted=True))).findings


def test_what_plain_loses_wireguard_loses_too() -> None:
    ways = ((H1, H2), (H2, H1))
    silent = {HOSTS[H2].wg_key: Peering(None, 0, 500), HOSTS[H3].wg_key: Peering(9.0, 1, 1)}
    measured = links([*lost(*ways), *lost(*ways, kind="encrypted")], encrypted=True)
    cut = [report(H1, reached={H2: False, H3: True}, peerings=silent), report(H2, reached={H1: False, H3: True})]
    assert only(view(*cut, measured=measured)).check == "path"


def test_a_key_that_is_not_the_published_one() -> None:
    measured = links(lost(*[w for w in WAYS if H2 in w], kind="encrypted"), encrypted=True)
    drift = tuple(of_host(Facts("h2", 4789, drift=("update WireGuard device (other key)",))))
    one = only(view(report(H2, tunnel_key="other", findings=drift), measured=measured))
    assert (one.check, one.hosts) == ("wireguard", ("h2",))
    assert one.evidence == f"its device has other, the store {HOSTS[H2].wg_key}"


def test_a_peer_that_is_missing() -> None:
    one = only(view(report(H1, peerings={HOSTS[H3].wg_key: Peering(9.0, 1, 1)}, unpeered=(HOSTS[H2].wg_key,))))
    assert one.cause == "h1 does not have h2's published WireGuard key among its peers"


@pytest.mark.parametrize(("lacking", "other"), [(H1, H2), (H2, H1)])
def test_a_peer_that_is_missing_is_the_root_of_what_is_lost_to_it(lacking: str, other: str) -> None:
    measured = links(lost((H1, H2), (H2, H1), kind="encrypted"), encrypted=True)
    drift = tuple(of_host(Facts(lacking[3:], 4789, drift=("put peer 192.168.78.1",))))
    one = only(view(report(lacking, unpeered=(HOSTS[other].wg_key,), findings=drift), measured=measured))
    a, b = lacking[3:], other[3:]
    assert one.cause == f"{a} does not have {b}'s published WireGuard key among its peers"


# Comparisons


def test_a_clock_that_is_ahead_of_two_others() -> None:
    one = only(view(report(H3, time=NOW + 3600)))
    assert (one.check, one.severity, one.hosts) == ("clock", "warning", ("h3",))
    assert one.cause == "the clock of h3 is 3600 s ahead of the others"
    mine = only(view(report(H2, time=NOW + 60), report(H3, time=NOW + 60)))
    assert mine.cause == "the clock of h1 is 60 s behind the others"


def test_of_two_clocks_nobody_knows_which_is_wrong() -> None:
    two = {H1: HOSTS[H1], H2: HOSTS[H2]}
    one = only(replace(view(hosts=two, measured=[]), reports={H1: report(H1), H2: report(H2, time=NOW - 10)}))
    assert one.cause == "the clocks of h1 and h2 differ by 10 s"


def test_a_slow_answer_is_no_skew() -> None:
    slow = dict.fromkeys((H2, H3), (NOW - 4.0, NOW + 0.1))
    assert examine(view(waits=slow)).findings == ()


def test_an_older_weft() -> None:
    one = only(view(report(H2, version="0.0.9")))
    assert (one.check, one.severity, one.hosts) == ("version", "warning", ("h2",))
    assert one.evidence.endswith("newest: 0.1.0")


def test_a_pool_that_is_nearly_full() -> None:
    assert examine(view(pools=[PoolUse("10.1.0.0/24", "app", 200, 253)])).findings == ()
    one = only(view(pools=[PoolUse("10.1.0.0/24", "app", 240, 253)]))
    assert (one.check, one.severity, one.command) == ("pools", "warning", "weft gc")
    assert one.evidence.startswith("240 of 253 addresses are held")


# One host's own facts


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        ({"daemon": "none listens"}, "host", "weft does not run"),
        ({"daemon": "the weft daemon at /run/x does not answer: timed out"}, "host", "weft hangs"),
        ({"registered": "the name h1 is another's"}, "host", "not registered"),
        ({"listener": "cannot listen on 127.0.0.1:9789"}, "host", "nobody can read"),
        ({"registered": "the underlay address 192.168.78.1 of this host is host h2's"}, "vtep", "another host has"),
        ({"device": ""}, "vtep", "on none of the host's interfaces"),
        ({"users": {51820: "x (pid 1)"}, "wg_port": 51820, "encryption": "in use"}, "udp-port", "WireGuard needs"),
        ({"users": {4790: "x (pid 1)"}, "networks": {4790: "app"}}, "udp-port", "4790, which network app needs, is"),
        ({"kernel": "cannot make VXLAN devices: load the vxlan module"}, "kernel", "cannot make"),
        ({"switches": (Switch("net.ipv4.ip_forward", "0", "1"),)}, "kernel", "net.ipv4.ip_forward must be 1"),
        ({"mounts": "it is not shared"}, "mounts", "outlives"),
        ({"dns": "there is no daemon.json"}, "names", "does not ask"),
        ({"resolver": "port 53 is in use"}, "names", "not answered"),
        ({"filtered": True, "resolver_address": "169.254.77.53"}, "names", "packet filter"),
        ({"store": Health("etcd cannot be used")}, "store", "cannot be reached"),
        ({"store": Health("x", members={"a": "no leader", "b": "refused", "c": "refused"})}, "store", "no quorum"),
        ({"store": Health("x", members={"a": "refused", "b": "refused", "c": ""})}, "store", "2 of 3 members"),
        ({"store": Health(members={"a": "refused", "b": "", "c": ""})}, "store", "1 of 3 members of etcd does not"),
        ({"store": Health(seconds=1.2)}, "store", "slow"),
        ({"store": Health(history=50_000)}, "store", "not compacted"),
        ({"store": Health(alarm="NOSPACE")}, "store", "NOSPACE"),
        ({"engine": "connection refused"}, "docker", "does not answer"),
        ({"orphans": ("endpoint x: Docker does not have it",)}, "docker", "what Docker has not"),
        ({"conflicts": ("network app: another one",)}, "docker", "does not agree"),
        ({"intruders": ("eth7",), "encryption": "shut"}, "guard", "another way out"),
        ({"encryption": "no WireGuard"}, "wireguard", "no encrypted network"),
        ({"drift": ("create vx7",)}, "drift", "otherwise than the store says"),
    ],
)
def test_what_a_host_finds_of_itself(facts: dict[str, Any], check: str, words: str) -> None:
    findings = list(
        of_host(Facts(**{"name": "h1", "port": 4789, "underlay": "192.168.78.1", "device": "eth0", **facts}))
    )
    assert [one.check for one in findings] == [check]
    assert words in findings[0].cause
    assert "\n" not in findings[0].cause + findings[0].evidence + findings[0].command


def test_what_follows_from_a_store_that_is_away_is_not_said() -> None:
    facts = Facts("h1", 4789, registered="not registered", store=Health("away"), orphans=("an address",))
    assert [one.check for one in of_host(facts)] == ["store"]


def test_a_report_survives_the_store_and_newer_fields() -> None:
    one = report(
        H1, drops=(PortDrop(4789, True, DROP, "app"),), findings=tuple(of_host(Facts("h1", 4789, kernel="no")))
    )
    assert Report.decode(one.encode()) == one
    assert Report.decode(one.encode().replace("{", '{"newer":1,', 1)) == one
    for damaged in ("", "[]", "{}", '{"host":1}', one.encode().replace('"drops":[{', '"drops":[{"x":1,', 1)[:-9]):
        with pytest.raises(Unreadable):
            Report.decode(damaged)


def test_about_one_host() -> None:
    examined = examine(view(report(H3, time=NOW + 3600), measured=links(lost((H1, H2)))))
    assert found(examined) == [("path", ("h1", "h2")), ("clock", ("h3",))]
    assert found(examined.about("h3")) == [("clock", ("h3",))]
    assert set(examined.about("h3").table) == {"h3"}
