"""Lookup by tables: who asks, for what, and what is answered."""

from __future__ import annotations

import pytest
from dns.message import make_query

from weft.cluster import Cluster
from weft.model import Endpoint, EndpointNames, Host, Network, Pool
from weft.names.dns import Responder
from weft.names.lookup import Asker, Kind, lookup

ME, OTHER, SILENT = "a" * 32, "b" * 32, "c" * 32
APP, DB = 4096, 4097


def network_of(vni: int, name: str) -> Network:
    return Network(vni, name, (Pool(f"10.{vni - 4000}.0.0/24"),), 0, False, "h1")


def container(
    cluster: Cluster, vni: int, name: str, *addresses: str, host: str = OTHER, aliases: tuple[str, ...] = ()
) -> Endpoint:
    """An endpoint with all that a container may be called; its id is of its name and network."""
    endpoint = Endpoint(f"{name}-{vni}", vni, "02:42:00:00:00:01", addresses, host)
    names = EndpointNames(vni, endpoint.id, host, name, aliases, f"host-of-{name}", f"{name:0>12}"[-12:])
    cluster.apply([(endpoint.key, endpoint.encode()), (names.key, names.encode())])
    return endpoint


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    hosts = [Host(one, one[0], f"192.0.2.{number}") for number, one in enumerate((ME, OTHER, SILENT))]
    made.apply([(host.key, host.encode()) for host in hosts])
    made.apply([(network.key, network.encode()) for network in (network_of(APP, "app"), network_of(DB, "Data.Base"))])
    made.apply([(host.alive_key, "1") for host in hosts[:2]])
    container(made, APP, "Web1", "10.96.0.3", "fd00::3", aliases=("Svc", "web"))
    container(made, APP, "web2", "10.96.0.4", aliases=("svc",), host=ME)
    container(made, APP, "web3", "10.96.0.5", aliases=("svc", "old"), host=SILENT)
    container(made, DB, "web1", "10.97.0.3")
    container(made, DB, "dotted.name", "10.97.0.4")
    return made


ON_APP = Asker.on({APP: "app"})
ON_DB = Asker.on({DB: "Data.Base"})
ON_BOTH = Asker.on({DB: "Data.Base", APP: "app"})


@pytest.mark.parametrize(
    ("asker", "question", "found"),
    [
        (ON_APP, "web1", ["10.96.0.3"]),
        (ON_APP, "WEB1", ["10.96.0.3"]),
        (ON_APP, "web", ["10.96.0.3"]),
        (ON_APP, "host-of-web1", ["10.96.0.3"]),
        (ON_APP, "00000000web1", ["10.96.0.3"]),
        (ON_APP, "web1.app", ["10.96.0.3"]),
        (ON_APP, "Web1.APP", ["10.96.0.3"]),
        (ON_APP, "svc.app", ["10.96.0.3", "10.96.0.4"]),
        (ON_DB, "web1", ["10.97.0.3"]),
        (ON_DB, "web1.data.base", ["10.97.0.3"]),
        (ON_DB, "dotted.name", ["10.97.0.4"]),
        (ON_DB, "dotted.name.data.base", ["10.97.0.4"]),
        (ON_BOTH, "web1", ["10.97.0.3"]),
        (ON_BOTH, "web1.app", ["10.96.0.3"]),
        (ON_BOTH, "svc", ["10.96.0.3", "10.96.0.4"]),
        (Asker.on({APP: "called-so-here"}), "web1.called-so-here", ["10.96.0.3"]),
        (Asker.on({APP: "called-so-here"}), "web1.app", ["10.96.0.3"]),
        (Asker.on({APP: ""}), "web1.app", ["10.96.0.3"]),
        (ON_APP, "old", ["10.96.0.5"]),
        (ON_APP, "dotted.name", None),
        (ON_APP, "web1.data.base", None),
        (ON_APP, "web1.", None),
        (ON_APP, "", None),
        (ON_APP, ".app", None),
        (ON_APP, "app", None),
        (ON_APP, "example.com", None),
        (Asker.on({}), "web1", None),
        (Asker.on({5000: "unknown"}), "web1.unknown", None),
    ],
)
def test_names(cluster: Cluster, asker: Asker, question: str, found: list[str] | None) -> None:
    assert lookup(cluster, asker, ME, question, Kind.A) == found


def test_each_turn_begins_with_another_address(cluster: Cluster) -> None:
    turns = [lookup(cluster, ON_APP, ME, "svc", Kind.A, turn) for turn in range(4)]
    assert turns == [["10.96.0.3", "10.96.0.4"], ["10.96.0.4", "10.96.0.3"]] * 2


@pytest.mark.parametrize(
    ("question", "kind", "found"),
    [
        ("web1", Kind.AAAA, ["fd00::3"]),
        ("web2", Kind.AAAA, []),
        ("web1", Kind.OTHER, []),
        ("web1", Kind.PTR, []),
        ("example.com", Kind.AAAA, None),
        ("3.0.96.10.in-addr.arpa", Kind.PTR, ["Web1.app"]),
        ("3.0.96.10.IN-ADDR.ARPA", Kind.PTR, ["Web1.app"]),
        ("3.0.96.10.in-addr.arpa", Kind.A, []),
        ("3." + "0." * 29 + "d.f.ip6.arpa", Kind.PTR, ["Web1.app"]),
        ("3." + "0." * 28 + "d.f.ip6.arpa", Kind.PTR, None),
        ("xy." + "0." * 29 + "d.f.ip6.arpa", Kind.PTR, None),
        ("3.0.97.10.in-addr.arpa", Kind.PTR, None),
        ("9.0.96.10.in-addr.arpa", Kind.PTR, None),
        ("0.96.10.in-addr.arpa", Kind.PTR, None),
        ("x.0.96.10.in-addr.arpa", Kind.PTR, None),
        ("in-addr.arpa", Kind.PTR, None),
    ],
)
def test_kinds(cluster: Cluster, question: str, kind: Kind, found: list[str] | None) -> None:
    assert lookup(cluster, ON_APP, ME, question, kind) == found


def test_this_host_is_alive_whatever_the_store_says(cluster: Cluster) -> None:
    assert lookup(cluster, ON_APP, SILENT, "svc", Kind.A) == ["10.96.0.3", "10.96.0.4", "10.96.0.5"]
    cluster.apply([(cluster.hosts[OTHER].alive_key, None)])
    assert lookup(cluster, ON_APP, ME, "svc", Kind.A) == ["10.96.0.4"]
    cluster.apply([(cluster.hosts[ME].alive_key, None)])
    assert lookup(cluster, ON_APP, ME, "svc", Kind.A) == ["10.96.0.4"]


def test_an_endpoint_that_is_gone_is_not_answered_even_if_its_names_stay(cluster: Cluster) -> None:
    endpoint = cluster.endpoints[APP]["Web1-4096"]
    cluster.apply([(endpoint.key, None)])
    assert lookup(cluster, ON_APP, ME, "web1", Kind.A) is None
    assert lookup(cluster, ON_APP, ME, "svc", Kind.A) == ["10.96.0.4"]
    assert lookup(cluster, ON_APP, ME, "3.0.96.10.in-addr.arpa", Kind.PTR) is None


def test_a_rename_leaves_no_old_name(cluster: Cluster) -> None:
    names = EndpointNames(APP, "Web1-4096", OTHER, "fresh", ("svc",))
    cluster.apply([(names.key, names.encode())])
    assert lookup(cluster, ON_APP, ME, "web1", Kind.A) is None
    assert lookup(cluster, ON_APP, ME, "fresh", Kind.A) == ["10.96.0.3"]
    cluster.apply([(names.key, None)])
    assert lookup(cluster, ON_APP, ME, "fresh", Kind.A) is None


def test_an_address_that_moved_is_its_new_holders(cluster: Cluster) -> None:
    """The record of the old one goes after the new one came."""
    new = container(cluster, APP, "heir", "10.96.0.3")
    old = cluster.endpoints[APP]["Web1-4096"]
    cluster.apply([(old.key, None)])
    assert cluster.holders["10.96.0.3"] == new
    assert lookup(cluster, ON_APP, ME, "3.0.96.10.in-addr.arpa", Kind.PTR) == ["heir.app"]


def test_the_index_is_empty_when_everything_is_gone(cluster: Cluster) -> None:
    for vni, endpoints in list(cluster.endpoints.items()):
        for endpoint in list(endpoints.values()):
            cluster.apply([(endpoint.key, None), (cluster.names[vni][endpoint.id].key, None)])
    assert (cluster.names, cluster.called, cluster.holders) == ({}, {}, {})


def test_the_snapshot_for_a_reboot_has_the_names(cluster: Cluster) -> None:
    again = Cluster()
    again.apply(cluster.entries_of(ME))
    assert lookup(again, ON_APP, ME, "web1", Kind.A) == ["10.96.0.3"]


def test_what_the_resolver_keeps_follows_whatever_happens_to_the_cluster(cluster: Cluster) -> None:
    def responder() -> Responder:
        resolve = lambda asker, question, kind, turn: lookup(cluster, asker, ME, question, kind, turn)  # noqa: E731
        return Responder(resolve, lambda: cluster.version)

    keeping, answers = responder(), []
    questions = [make_query(name, kind).to_wire() for name in ("web1", "old", "web1.base") for kind in ("A", "AAAA")]
    web1, host = cluster.endpoints[APP]["Web1-4096"], cluster.hosts[OTHER]
    renamed = EndpointNames(APP, web1.id, OTHER, "fresh", ("old",))
    network = network_of(APP, "base")
    gone_and_back: list[tuple[str, str | None]] = [(host.alive_key, None), (host.alive_key, "1")]
    events = [*gone_and_back, (network.key, network.encode()), (renamed.key, renamed.encode()), (web1.key, None)]
    for event in events:
        cluster.apply([event])
        answers.append([keeping.respond(wire, ON_APP) for wire in questions])
        assert answers[-1] == [responder().respond(wire, ON_APP) for wire in questions]
    assert len(set(map(tuple, answers))) == 4  # the first and the third are alike
    cluster.load([])
    assert [keeping.respond(wire, ON_APP) for wire in questions] == [responder().respond(w, None) for w in questions]
