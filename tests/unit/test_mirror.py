"""What the mirror plans, and what comes of it on several hosts with engines in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine, OpenGate
from tests.unit.conftest import FakeHost
from weft.api import Gate, create_app
from weft.cluster import Cluster, Touched
from weft.engine.inventory import DockerNetwork
from weft.engine.mirror import Create, Learn, Mirror, Plan, Publish, Remove, Replace, plan
from weft.engine.sweeper import Sweeper
from weft.errors import EngineError
from weft.model import Endpoint, Host, Member, Network, Pool, Published, name_key
from weft.names.sandboxes import ResolverRoutes
from weft.options import parse_options
from weft.store import Put
from weft.store.sqlite import SqliteStore

Hosts = Callable[..., FakeHost]
CIDR = "10.1.0.0/24"
ME, OTHER = Host("1" * 32, "h1", "192.168.78.1"), Host("2" * 32, "h2", "192.168.78.2")


# The plan


def network(vni: int, name: str = "app", *, published: bool = True, retired: bool = False) -> Network:
    spec = Published() if published else None
    return Network(vni, name, (Pool(f"10.{vni}.0.0/24"),), 0, False, "h2", spec, retired)


def docker(network_id: str, name: str = "app", *, driver: str = "weft", scope: str = "local") -> DockerNetwork:
    return DockerNetwork(network_id, name, driver, scope, False, (), Published())


def cluster(*networks: Network, mine: dict[str, int] | None = None, endpoint: int = 0) -> Cluster:
    """`mine`: this engine's NetworkIDs of VNIs. `endpoint`: a VNI on which h2 has an endpoint."""
    made = Cluster()
    members = [Member(vni, ME.id, network_id) for network_id, vni in (mine or {}).items()]
    used = [Endpoint("e1", endpoint, "02:42:0a:01:00:02", (), OTHER.id)] if endpoint else []
    records: list[Host | Network | Member | Endpoint] = [ME, OTHER, *networks, *members, *used]
    made.apply((record.key, record.encode()) for record in records)
    return made


def planned(made: Cluster, *found: DockerNetwork, mirror: bool = True) -> Plan:
    return plan(made, ME, found, driver="weft", mirror=mirror)


def used(found: DockerNetwork) -> DockerNetwork:
    return replace(found, endpoints=("e",))  # type: ignore[arg-type]


N1, UNPUBLISHED = docker("n1"), network(7, "", published=False)


@pytest.mark.parametrize(
    ("made", "found", "steps"),
    [
        (cluster(UNPUBLISHED, mine={"n1": 7}), [N1], [Publish(7, N1)]),
        (cluster(network(7, published=False), mine={"n1": 7}), [N1], [Publish(7, N1)]),
        (cluster(network(7), mine={"n1": 7}), [N1], []),
        (cluster(network(7)), [], [Create(network(7))]),
        (cluster(network(8), network(7, "web")), [], [Create(network(7, "web")), Create(network(8))]),
        (cluster(network(7, retired=True)), [], []),
        (cluster(network(7, retired=True), mine={"n1": 7}), [N1], [Remove(7, N1)]),
        (cluster(network(7, retired=True), mine={"n1": 7}), [used(N1)], []),
        (cluster(network(7, published=False)), [], []),
        (cluster(network(8), UNPUBLISHED, mine={"n1": 7}), [N1], [Replace(7, N1, network(8))]),
        (
            cluster(network(8, retired=True), UNPUBLISHED, mine={"n1": 7}),
            [N1],
            [Replace(7, N1, network(8, retired=True))],
        ),
        # What the collector or the adoption has to do first.
        (cluster(network(7), mine={"gone": 7}), [], []),
        (cluster(network(8), UNPUBLISHED, mine={"n1": 7, "gone": 8}), [N1], []),
        (cluster(network(7)), [N1], []),
        # Docker has two networks of one name.
        (cluster(network(8), UNPUBLISHED, mine={"n1": 7, "n8": 8}), [N1, docker("n8")], [Remove(7, N1)]),
        # Networks of a Swarm, and those with another name elsewhere, only have a name to learn.
        (cluster(UNPUBLISHED, mine={"n1": 7}), [docker("n1", scope="swarm")], [Learn(7, "app")]),
        (cluster(network(7, "web", published=False), mine={"n1": 7}), [N1], []),
    ],
)
def test_steps(made: Cluster, found: list[DockerNetwork], steps: list[object]) -> None:
    assert planned(made, *found) == Plan(steps, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "found", "vni", "words"),
    [
        (
            cluster(network(8), network(7, published=False), mine={"n1": 7}, endpoint=7),
            [N1],
            7,
            "two networks are called app: VNI 7 on h1, h2, and VNI 8 on no host, which has the name",
        ),
        (cluster(network(8), UNPUBLISHED, mine={"n1": 7}), [used(N1)], 7, "Stop the containers on VNI 7"),
        (cluster(network(7)), [docker("b", driver="bridge")], 7, "another network of that name, of driver bridge"),
        (
            cluster(network(8), UNPUBLISHED, mine={"n1": 7, "n8": 8}),
            [N1, docker("n8", "alias")],
            7,
            r"has network app \(VNI 8\) as Docker network alias, and another network, with VNI 7, as app",
        ),
        (
            cluster(network(7), network(8, "web"), mine={"n8": 8}),
            [docker("n8")],
            7,
            r"Docker has network web \(VNI 8\)",
        ),
    ],
)
def test_conflicts(made: Cluster, found: list[DockerNetwork], vni: int, words: str) -> None:
    outcome = planned(made, *found)
    assert outcome.steps == []
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(outcome.conflicts[vni])


def test_without_mirroring_only_names_are_learned() -> None:
    made = cluster(UNPUBLISHED, network(8, "web"), network(9, "old", retired=True), mine={"n1": 7, "n9": 9})
    assert planned(made, N1, docker("n9", "old"), mirror=False) == Plan([Learn(7, "app")], {})


# What comes of it


class Mirrored:
    """A host with an engine in memory."""

    def __init__(self, host: FakeHost, store: SqliteStore, *, enabled: bool = True) -> None:
        self.host = host
        self.store = store
        self.engine = FakeEngine(host.mirror_network, host.remove_network)
        self.cluster = host.agent.cluster
        self.mirror = Mirror(store, host.record, self.cluster, host.driver.networks, self.engine, enabled=enabled)
        self.sweeper = Sweeper(self.engine, store, host.record, self.cluster, [self.mirror])

    def create(
        self, network_id: str, name: str, cidr: str = CIDR, *, options: dict[str, str] | None = None, **more: object
    ) -> Network:
        """As a user does."""
        made = self.host.create_network(network_id, cidr, **asdict(parse_options(options or {})))
        self.engine.add(network_id, name, cidr, options=options or {}, **more)  # type: ignore[arg-type]
        return made

    def remove(self, network_id: str) -> None:
        self.engine.remove(network_id)

    def run(self, network_id: str, endpoint_id: str, cidr: str = CIDR) -> None:
        self.engine.attach(network_id, self.host.run(network_id, endpoint_id, cidr))

    def look(self) -> None:
        self.cluster.load(self.store.list("topology/").entries)

    def sweep(self) -> None:
        self.look()
        self.sweeper.sweep()

    def networks(self) -> dict[str, set[str]]:
        """Subnets by name."""
        return {found.name: found.subnets for found in self.engine.present.values()}


@pytest.fixture
def pair(host: Hosts, store: SqliteStore) -> Iterator[tuple[Mirrored, Mirrored]]:
    one, two = Mirrored(host(1), store), Mirrored(host(2), store)
    yield one, two
    for each in (one, two, one, two):
        each.sweep()
    before = store.list("")
    one.sweep(), two.sweep()  # type: ignore[func-returns-value]
    assert store.list("") == before, "planning again after all was done gives nothing"


Pair = tuple[Mirrored, Mirrored]


def networks(store: SqliteStore) -> list[Network]:
    return [Network.decode(entry.value) for entry in store.list("topology/networks/").entries]


def test_a_network_is_made_on_the_other_host_as_it_was_typed(pair: Pair) -> None:
    one, two = pair
    spec: dict[str, Any] = {
        "labels": {"a": "b"},
        "options": {"mtu": "1400"},
        "ranges": {CIDR: "10.1.0.64/26"},
        "attachable": True,
    }
    one.create("n1", "app", CIDR, **spec)
    one.sweep()
    two.sweep()
    (found,) = two.engine.present.values()
    assert found.published == Published(**spec)
    assert two.host.driver.networks.find("app").vni == one.host.driver.networks.find("app").vni


def test_the_mirror_knows_better_than_the_options_which_network_is_meant(pair: Pair, store: SqliteStore) -> None:
    """After a loss of the store a network may have another VNI than was typed for it."""
    one, two = pair
    network = one.create("n1", "app", options={"mtu": "1400"})
    one.engine.add("n1", "app", CIDR, options={"weft.vni": "77", "weft.network": "78", "mtu": "1400"})
    one.sweep()
    two.sweep()
    assert two.networks() == {"app": {CIDR}}
    assert [n.vni for n in networks(store)] == [network.vni]


def test_a_removed_network_stays_where_it_is_used_and_then_goes(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    two.sweep()
    two.run("made1", "e1")
    one.remove("n1")
    for each in (two, one):
        each.sweep()
    assert (one.networks(), two.networks()) == ({}, {"app": {CIDR}})
    two.engine.detach("made1")
    two.host.driver.delete_endpoint("made1", "e1")
    two.sweep()
    assert two.networks() == {}
    kept = {one.host.record.key, two.host.record.key}
    assert {entry.key for entry in store.list("").entries if not entry.key.startswith("ipam/pending")} == kept


def test_what_is_pruned_here_but_used_elsewhere_comes_back(
    pair: Pair, store: SqliteStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used nowhere goes; and what somebody had removed before stays so."""
    now = 1000.0
    monkeypatch.setattr("weft.networks.monotonic", lambda: now)
    one, two = pair
    for number, name in enumerate(("typed", "used", "unused"), 1):
        one.create(f"n{number}", name, f"10.{number}.0.0/24")
    one.sweep()
    two.sweep()
    there = {found.name: found.id for found in two.engine.present.values()}
    two.run(there["typed"], "e1", "10.1.0.0/24")
    two.run(there["used"], "e2", "10.2.0.0/24")
    one.look()
    one.remove("n1")
    now += 7
    for number in (2, 3):
        one.remove(f"n{number}")
        now += 3
    two.sweep()
    one.host.driver.networks.spare_used(now)
    assert {n.name: n.wanted for n in networks(store)} == {"typed": False, "used": True}
    two.engine.detach(there["used"])  # as when the container is restarted
    for each in (two, one):
        each.sweep()
    assert (set(one.networks()), set(two.networks())) == ({"used"}, {"typed", "used"})
    assert caplog.text.count("was pruned here, but is in use on h2") == 1
    one.host.driver.networks.spare_used(now)
    one.remove(next(found.id for found in one.engine.present.values()))
    assert [n.wanted for n in networks(store) if n.name == "used"] == [False]


def test_joining_a_retired_network_makes_all_want_it_again(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    two.sweep()
    two.run("made1", "e1")
    one.remove("n1")
    one.create("n1again", "app")
    two.engine.detach("made1")
    two.sweep()
    assert (one.networks(), two.networks()) == ({"app": {CIDR}}, {"app": {CIDR}})
    assert [n.wanted for n in networks(store)] == [True]


def test_the_unused_loser_of_a_race_becomes_the_winner(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    winner = one.create("n1", "app")
    two.create("n2", "app", "10.2.0.0/24")
    one.look(), two.look()  # type: ignore[func-returns-value]
    one.sweeper.sweep()
    two.sweeper.sweep()  # has not seen yet that the name is taken
    two.sweep()
    assert two.networks() == {"app": {CIDR}}
    assert [n.vni for n in networks(store)] == [winner.vni]
    assert store.get(name_key("app")).value == str(winner.vni)  # type: ignore[union-attr]


def test_the_used_loser_is_a_conflict_that_is_said_once_and_ends(
    pair: Pair, store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    two.create("n2", "app", "10.2.0.0/24")
    two.run("n2", "e1", "10.2.0.0/24")
    for _ in range(3):
        two.sweep()
    assert [
        r.getMessage().count("two networks are called app") for r in caplog.records if r.levelno >= logging.ERROR
    ] == [1]
    assert len(two.sweeper.conflicts) == 1
    two.engine.detach("n2")
    two.host.driver.delete_endpoint("n2", "e1")
    two.sweep()
    assert two.networks() == {"app": {CIDR}}
    assert not two.sweeper.conflicts


def test_the_loser_takes_over_when_the_winner_is_gone(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    loser = two.create("n2", "app", "10.2.0.0/24")
    two.run("n2", "e1", "10.2.0.0/24")
    two.sweep()
    one.remove("n1")
    two.sweep()
    one.sweep()
    assert one.networks() == {"app": {"10.2.0.0/24"}}
    assert [n.vni for n in networks(store)] == [loser.vni]


def test_a_new_network_of_a_retired_ones_name_becomes_that_one(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    first = one.create("n1", "app")
    one.sweep()
    two.sweep()
    two.run("made1", "e1")
    one.remove("n1")
    one.create("n1again", "app", "10.2.0.0/24")
    one.sweep()
    assert one.networks() == two.networks() == {"app": {CIDR}}
    assert [(n.vni, n.wanted) for n in networks(store)] == [(first.vni, True)]


def test_a_network_that_vanishes_while_it_is_made_here_is_not_founded_anew(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    two.look()
    one.remove("n1")
    two.sweeper.sweep()
    assert two.networks() == {}
    assert not networks(store)
    assert not store.list("ipam/").entries


def test_a_network_that_retires_while_it_is_made_here_stays_retired(
    pair: Pair, store: SqliteStore, host: Hosts
) -> None:
    one, two = pair
    three = Mirrored(host(3), store)
    one.create("n1", "app")
    one.sweep()
    three.sweep()
    three.run("made1", "e1")
    two.look()
    one.remove("n1")
    two.sweeper.sweep()
    assert two.networks() == {}
    assert [n.retired for n in networks(store)] == [True]


def test_a_network_that_is_wanted_again_while_it_is_removed_here_is_not_retired(pair: Pair, store: SqliteStore) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    two.sweep()
    one.remove("n1")
    two.look()
    one.create("n1again", "app")
    two.sweeper.sweep()
    assert [n.wanted for n in networks(store)] == [True]
    assert two.networks() == {"app": {CIDR}}


def test_a_create_that_docker_gives_up_after_the_driver_does_not_retire_the_network(
    pair: Pair, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.engine.mirror._RETRY_SECONDS", 0.0)
    one, two = pair

    def create_and_give_up(network_id: str, network: Network) -> None:
        two.host.mirror_network(network_id, network)
        two.host.remove_network(network_id, CIDR)
        raise EngineError("the disk is full")

    one.create("n1", "app")
    one.sweep()
    working, two.engine._create = two.engine._create, create_and_give_up
    two.sweep()
    two.sweep()
    assert "the disk is full" in "".join(two.sweeper.conflicts.values())
    assert [n.wanted for n in networks(store)] == [True]
    two.engine._create = working
    two.sweep()
    assert two.networks() == {"app": {CIDR}}


class Clock:
    """Time that a test lets pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("weft.engine.mirror.monotonic", lambda: self.now)


def test_what_an_engine_can_never_make_is_tried_less_and_less(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an encrypted network on a host without WireGuard: each time costs the engine and the store something."""
    clock, (one, two) = Clock(monkeypatch), pair
    two.host.kernel.wireguard = False
    network = one.create("n1", "app", options={"encrypted": ""})
    one.sweep()
    tries: list[float] = []

    def create(network_id: str, network: Network) -> None:
        tries.append(clock.now)
        two.host.mirror_network(network_id, network)

    two.engine._create = create
    while clock.now < 1600:
        two.look()
        clock.now += two.sweeper.sweep()
    assert tries == [1000, 1002, 1006, 1014, 1030, 1062, 1126, 1246, 1366, 1486]
    assert "install wireguard-go" in two.sweeper.conflicts[f"VNI {network.vni}"]
    two.host.kernel.wireguard = True
    clock.now = 1606
    two.sweep()
    assert two.networks() == {"app": {CIDR}}
    assert not two.sweeper.conflicts


@pytest.mark.parametrize("helps", ["the network is another", "one of the engine's is gone", "the engine was away"])
def test_what_was_refused_is_tried_at_once_when_something_may_help(
    pair: Pair, store: SqliteStore, monkeypatch: pytest.MonkeyPatch, helps: str
) -> None:
    Clock(monkeypatch)
    one, two = pair
    two.engine.add("b1", "rival", driver="bridge")
    two.host.kernel.wireguard = False
    network = one.create("n1", "app", options={"encrypted": ""})
    one.sweep()
    two.sweep()
    two.host.kernel.wireguard = True
    two.sweep()
    assert "app" not in two.networks()
    match helps:
        case "the network is another":
            published = replace(one.host.driver.networks.find("app"), generation=1)
            store.transact([], [Put(published.key, published.encode())])
        case "one of the engine's is gone":
            two.engine.present.pop("b1")
        case _:
            two.mirror.forget()
    two.sweep()
    assert two.networks()["app"] == {CIDR}
    two.engine.present.pop("b1", None)
    assert network.encrypted


class ClosedGate(OpenGate):
    """The store is away: what takes something away is kept; see `unfinished.Unfinished`."""

    def __init__(self) -> None:
        self.kept: list[Callable[[], object]] = []

    def finish(self, what: str, work: Callable[[], object]) -> None:
        self.kept.append(work)


def delete(host: FakeHost, gate: Gate, network_id: str) -> None:
    """The engine says that it removed a network."""
    routes = ResolverRoutes(host.cluster, host.record.id, "", Path("/nonexistent"))
    app = create_app(host.driver, host.ipam, gate, routes)
    assert app.test_client().post("/NetworkDriver.DeleteNetwork", json={"NetworkID": network_id}).json == {}


@pytest.mark.parametrize("again", [True, False])
def test_a_removal_that_waited_for_the_store_retires_only_what_was_removed(
    pair: Pair, store: SqliteStore, again: bool
) -> None:
    one, two = pair
    one.create("n1", "app")
    for each in (one, two, one):
        each.sweep()
    gate = ClosedGate()
    delete(one.host, gate, "n1")
    if again:
        two.remove("made1")
        two.create("n2", "app")
        one.look()
    for work in gate.kept:
        work()
    assert [n.wanted for n in networks(store)] == [again]
    del one.engine.present["n1"]


@pytest.mark.parametrize("removed", [True, False])
def test_what_the_mirror_makes_or_removes_does_not_retire_later_either(
    pair: Pair, store: SqliteStore, removed: bool
) -> None:
    one, two = pair
    one.create("n1", "app")
    one.sweep()
    gate = ClosedGate()
    if removed:
        two.sweep()
        with two.host.driver.networks.removing("made1"):
            delete(two.host, gate, "made1")
        del two.engine.present["made1"]
    else:
        network = two.host.driver.networks.find("app")
        with two.host.driver.networks.expecting(network):
            two.host.mirror_network("made1", network)
            delete(two.host, gate, "made1")
    two.look()
    for work in gate.kept:
        work()
    assert [n.wanted for n in networks(store)] == [True]


def test_a_name_whose_network_is_gone_is_free(pair: Pair, store: SqliteStore) -> None:
    one, _ = pair
    store.transact([], [Put(name_key("app"), "77")])
    network = one.create("n1", "app")
    one.sweep()
    assert store.get(name_key("app")).value == str(network.vni)  # type: ignore[union-attr]


def test_a_host_that_does_not_mirror_keeps_to_itself(host: Hosts, store: SqliteStore) -> None:
    off, on = Mirrored(host(1, mirror=False), store, enabled=False), Mirrored(host(2), store)
    on.create("n1", "app")
    on.sweep()
    off.create("n2", "app")
    off.create("n3", "own", "10.3.0.0/24")
    for each in (off, on, off):
        each.sweep()
    assert on.networks() == {"app": {CIDR}}
    assert off.host.driver.networks.find("own").published is None
    off.remove("n2")
    on.sweep()
    assert on.host.driver.networks.find("app").wanted
    on.remove("n1")
    off.remove("n3")
    assert not networks(store)


@pytest.mark.parametrize(
    ("made", "vni", "concerned"),
    [
        (cluster(network(7)), 7, True),
        (cluster(network(7), mine={"n1": 7}), 7, False),
        (cluster(network(7, retired=True), mine={"n1": 7}), 7, True),
        (cluster(network(7, published=False)), 7, False),
        (cluster(), 7, False),
    ],
)
def test_only_changes_that_may_ask_for_something_here_wake_the_sweeper(
    host: Hosts, store: SqliteStore, made: Cluster, vni: int, concerned: bool
) -> None:
    mirror = Mirror(store, ME, made, host(1).driver.networks, FakeEngine(), enabled=True)
    assert mirror.concerns(Touched(networks={vni})) is concerned
    assert mirror.concerns(None)
