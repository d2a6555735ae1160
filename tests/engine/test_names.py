"""Containers find each other by name, across hosts, as on Docker's own networks; and nothing breaks the user's DNS."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import closing
from ipaddress import ip_address
from statistics import median
from typing import Any

import dns.message
import dns.rcode
import pytest

from bench.measure import percentile
from lab import Host
from lab.host import RESOLVER
from lab.plan import PROJECT
from tests.engine.asking import EMBEDDED, Inside, flood
from tests.engine.conftest import IMAGE, Cluster, eventually, reaches
from weft.model import Endpoint, EndpointNames
from weft.store import Put, Write
from weft.store.sqlite import SqliteStore

APP, DB, INSIDE = "10.77.0.0/24", "10.78.0.0/24", "10.79.0.0/24"
QUICK = 0.3
"""Seconds from Docker's word to the other host's resolver, 99 times out of 100."""
BUSY = 3
"""Times that, on a machine that does other things as well: a slow one must not fail, a lost event must."""

NO_WAIT = 2.0
"""Seconds. Docker waits four for a server that says nothing before it asks the next."""


@pytest.fixture
def app(cluster: Cluster) -> Cluster:
    """The network app, web1 with all kinds of names on the first host, web2 on the second."""
    cluster.network("app", subnet=APP)
    cluster.run(cluster.h1, "web1", "app", "--hostname", "Front", "--network-alias", "Shop")
    cluster.run(cluster.h2, "web2", "app")
    return cluster


def test_every_name_of_a_container_on_the_other_host(app: Cluster, inside: Inside) -> None:
    address, short_id = app.address(app.h1, "web1", "app"), app.h1.docker("ps", "-q", "--filter", "name=web1")
    ask = inside(app.h2, "web2")
    ask("web1", until="answered")
    for name in ("web1", "WEB1", "web1.app", "Web1.App", "shop", "shop.app", "front", "front.app", short_id):
        assert ask(name).answers == [address], name
    reverse = ".".join(reversed(address.split(".")))
    assert ask(f"{reverse}.in-addr.arpa", "PTR").answers == ["web1.app."]
    assert ask("web1", "AAAA")[:2] == ("NOERROR", [])
    assert ask("web1", tcp=True).answers == [address]
    assert reaches(app.h2, "web2", "web1")
    assert reaches(app.h2, "web2", "Shop")
    # From the other side, and of oneself, all is as Docker has it.
    back = inside(app.h1, "web1")
    assert back("web2", until="answered").answers == [app.address(app.h2, "web2", "app")]
    assert back("web1").answers == [address]


def test_one_containers_flood_costs_another_no_answer(app: Cluster, inside: Inside) -> None:
    """With the limits as they are shipped, on a machine of any speed."""
    app.run(app.h2, "wild", "app")
    ask = inside(app.h2, "web2")
    assert ask("web1", server=RESOLVER, until="answered").answers
    before = len(app.h2.log("weft"))
    with flood(app.h2, "wild", RESOLVER):
        assert all(ask("web1", server=RESOLVER).answers for _ in range(100))
        eventually(lambda: "asks for names too often" in app.h2.log("weft")[before:], "it is named", timeout=30)
    named = set(re.findall(r"container at (\S+) asks for names too often", app.h2.log("weft")[before:]))
    assert len(named) == 1
    assert inside(app.h2, "wild")("web1", until="answered", timeout=1).answers  # again, after a while


@pytest.mark.parametrize("tcp", [False, True])
def test_odd_questions_from_a_container_are_answered_or_refused(app: Cluster, inside: Inside, tcp: bool) -> None:
    ask = inside(app.h2, "web2")
    assert ask("web1", until="answered").answers

    def answer(name: str, kind: str, rdclass: str = "IN", **settings: Any) -> dns.message.Message:
        query = dns.message.make_query(name, kind, rdclass, **settings)
        reply = dns.message.from_wire(ask.raw(query.to_wire(), server=RESOLVER, tcp=tcp))
        assert query.is_response(reply)
        return reply

    plain, extended = answer("web1", "A"), answer("web1", "A", use_edns=0, payload=4096)
    assert plain.answer == extended.answer != []
    assert (plain.edns, extended.edns) == (-1, 0)
    assert answer("web1", "A", use_edns=1).rcode() == dns.rcode.BADVERS
    for odd in (("version.bind", "TXT", "CH"), ("web1", "ANY"), ("web1", "AXFR"), (".".join(["a" * 49] * 5), "A")):
        assert answer(*odd).rcode() == dns.rcode.REFUSED, odd
    valid = dns.message.make_query("web1", "A").to_wire()
    for broken in (valid[:-3], valid[:12] + b"\xc0\x0c" + valid[18:], valid[:12] + b"\x3f" + b"a" * 300):
        reply = ask.raw(broken, server=RESOLVER, tcp=tcp)
        assert (reply[:2], reply[3] & 0xF) == (valid[:2], dns.rcode.FORMERR)
    for silent in (valid[:7], b"\x00", valid[:2] + b"\x81\x80" + valid[4:]):  # no question, or an answer
        assert ask.raw(silent, server=RESOLVER, tcp=tcp, timeout=0.3) == b""
    assert ask("web1", tcp=tcp).answers  # as before


def test_names_that_are_not_ours_go_to_the_users_servers(app: Cluster, inside: Inside) -> None:
    ask = inside(app.h2, "web2")
    assert ask("gateway.lab").answers == [app.lab.plan.gateway]
    assert ask("nowhere.lab").code == "NXDOMAIN"
    assert ask("nowhere.lab", server=RESOLVER).code == "REFUSED"
    app.h2.docker("run", "-d", "--name", "plain", IMAGE)
    assert inside(app.h2, "plain")("gateway.lab", server=RESOLVER).code == "REFUSED"
    assert reaches(app.h2, "plain", "gateway.lab")  # its C library goes on to the next server by itself
    app.h2.docker("run", "-d", "--name", "own", "--network", "app", "--dns", app.lab.plan.gateway, IMAGE)
    assert inside(app.h2, "own")("web1").code == "NXDOMAIN"  # documented: --dns replaces the resolver


def test_an_ipv6_network(cluster: Cluster, inside: Inside) -> None:
    cluster.network("six", "--ipv6", "--subnet", "fd00:77::/64", subnet=APP)
    cluster.run(cluster.h1, "web1", "six")
    cluster.run(cluster.h2, "web2", "six")
    address = cluster.address(cluster.h1, "web1", "six", field="GlobalIPv6Address")
    ask = inside(cluster.h2, "web2")
    assert ask("web1", "AAAA", until="answered").answers == [address]
    assert ask("web1").answers == [cluster.address(cluster.h1, "web1", "six")]
    assert ask(ip_address(address).reverse_pointer, "PTR").answers == ["web1.six."]


def test_an_alias_of_several_is_all_of_them_in_turn(cluster: Cluster, inside: Inside) -> None:
    """As Compose does: `--scale web=2` on each host gives replicas the service's name and one of their own."""
    cluster.network("app", subnet=APP)
    replicas: dict[Host, set[str]] = {}
    for host in cluster.lab.hosts:
        names = [f"shop_web_{host.name}_{number}" for number in (1, 2)]
        replicas[host] = {cluster.run(host, name, "app", "--network-alias", "web") for name in names}
    cluster.run(cluster.h2, "other", "app")
    ask = inside(cluster.h2, "other")
    everyone = replicas[cluster.h1] | replicas[cluster.h2]
    eventually(lambda: set(ask("web", server=RESOLVER).answers) == everyone, "all replicas")
    firsts = [ask("web", server=RESOLVER).answers[0] for _ in range(8)]
    assert set(firsts) == everyone
    # Docker answers what it knows itself; it asks for what is on other hosts only. Documented.
    assert set(ask("web").answers) == replicas[cluster.h2]
    cluster.h2.docker("rm", "-f", "shop_web_h2_1", "shop_web_h2_2")
    eventually(lambda: set(ask("web").answers) == replicas[cluster.h1], "those of the other host")
    assert {ask("web").answers[0] for _ in range(8)} == replicas[cluster.h1]
    assert reaches(cluster.h2, "other", "shop_web_h1_1")


def test_a_name_is_that_of_the_askers_network(cluster: Cluster, inside: Inside) -> None:
    for name, subnet in (("app", APP), ("db", DB)):
        cluster.network(name, subnet=subnet)
    on_app = cluster.run(cluster.h1, "one", "app", "--network-alias", "same")
    on_db = cluster.run(cluster.h1, "two", "db", "--network-alias", "same")
    for name, networks in (("xx", ["app"]), ("yy", ["db"]), ("zz", ["app", "db"])):
        cluster.run(cluster.h2, name, networks[0])
        for network in networks[1:]:
            cluster.h2.docker("network", "connect", network, name)
    asks = {name: inside(cluster.h2, name) for name in ("xx", "yy", "zz")}
    assert asks["xx"]("same", until="answered").answers == [on_app]
    assert asks["yy"]("same", until="answered").answers == [on_db]
    assert asks["xx"]("two").code == asks["yy"]("one").code == "NXDOMAIN"
    assert asks["xx"]("same.db").code == "NXDOMAIN"
    assert asks["zz"]("same.app", until="answered").answers == asks["zz"]("one").answers == [on_app]
    assert asks["zz"]("same.db", until="answered").answers == asks["zz"]("two").answers == [on_db]


def test_a_large_answer_is_truncated_and_then_comes_over_tcp(app: Cluster, inside: Inside) -> None:
    """A hundred containers of a host that nobody has heard of, so that none collects them."""
    vni = int(app.keys("topology/networks/")[0].rpartition("/")[2])
    writes: list[Write] = []
    for number in range(100):
        endpoint = Endpoint(
            f"{number:064x}", vni, f"02:42:0a:4d:01:{number:02x}", (f"10.77.0.{100 + number}",), "f" * 32
        )
        names = EndpointNames(vni, endpoint.id, "f" * 32, f"crowd{number}", ("crowd",))
        writes += [Put(endpoint.key, endpoint.encode()), Put(names.key, names.encode())]
    with closing(SqliteStore(app.lab.plan.data / "store.db")) as store:
        store.transact([], writes)
    ask = inside(app.h2, "web2")
    assert ask("crowd", until="answered").truncated
    for server in (EMBEDDED, RESOLVER):
        whole = ask("crowd", server=server, tcp=True)
        assert (len(set(whole.answers)), whole.truncated) == (100, False)
        assert 20 < len(ask("crowd", server=server).answers) < 100


def test_internal_networks(cluster: Cluster, inside: Inside) -> None:
    """Nothing leads out of them but a route to the resolver, of which a container has one, whatever is connected."""
    cluster.network("inside", "--internal", subnet=INSIDE)
    cluster.network("more", "--internal", subnet=DB)
    cluster.network("app", subnet=APP)
    cluster.run(cluster.h1, "in1", "inside")
    cluster.run(cluster.h1, "more1", "more")
    cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "in2", "inside")
    assert inside(cluster.h2, "in2")("in1", until="answered").answers == [cluster.address(cluster.h1, "in1", "inside")]
    assert reaches(cluster.h2, "in2", "in1")
    for network, other in (("more", "more1"), ("app", "web1")):
        cluster.h2.docker("network", "connect", network, "in2")
        assert inside(cluster.h2, "in2")(other, until="answered").answers, other
    cluster.h2.docker("restart", "-t", "1", "in2")
    ask = inside(cluster.h2, "in2")
    for other in ("in1", "more1", "web1"):
        assert ask(other, until="answered").answers, other
    # With the network that brought it goes the route; the way out by app is left.
    cluster.h2.docker("network", "disconnect", "inside", "in2")
    assert ask("in1", until="gone").answers == []
    assert ask("web1", until="answered").answers
    cluster.h2.docker("network", "connect", "inside", "in2")
    assert ask("in1", until="answered").answers
    cluster.h2.docker("restart", "-t", "1", "in2")
    assert inside(cluster.h2, "in2")("in1", until="answered").answers


def test_weft_restarted_between_two_internal_networks(cluster: Cluster, inside: Inside) -> None:
    cluster.network("inside", "--internal", subnet=INSIDE)
    cluster.network("more", "--internal", subnet=DB)
    cluster.run(cluster.h1, "in1", "inside")
    cluster.run(cluster.h2, "in2", "inside")
    cluster.h2.restart_weft()
    cluster.h2.docker("network", "connect", "more", "in2")
    cluster.h2.docker("restart", "-t", "1", "in2")
    assert inside(cluster.h2, "in2")("in1", until="answered").answers


def test_names_follow_what_happens_to_a_container(app: Cluster, inside: Inside) -> None:
    ask = inside(app.h2, "web2")
    address = app.address(app.h1, "web1", "app")
    assert ask("web1", until="answered").answers == [address]
    app.h1.docker("rename", "web1", "fresh")
    assert ask("fresh", until="answered").answers == [address]
    assert ask("web1", until="gone").answers == []
    app.h1.docker("network", "disconnect", "app", "fresh")
    assert ask("fresh", until="gone").answers == []
    app.h1.docker("network", "connect", "--alias", "late", "app", "fresh")
    address = app.address(app.h1, "fresh", "app")
    assert ask("late", until="answered").answers == [address]
    assert ask("fresh").answers == [address]
    app.h1.docker("stop", "-t", "1", "fresh")
    assert ask("late", until="gone").answers == ask("fresh", until="gone").answers == []
    app.h1.docker("start", "fresh")
    assert ask("late", until="answered").answers == [app.address(app.h1, "fresh", "app")]
    app.h1.docker("rm", "-f", "fresh")
    assert ask("fresh", until="gone").answers == []


def test_names_come_and_go_within_a_moment(app: Cluster, inside: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    ask = inside(app.h2, "web2")
    come, gone = [], []
    for number in range(15):
        app.h1.docker("run", "-d", "--name", f"quick{number}", "--network", "app", IMAGE)
        began = time.monotonic()
        come.append(ask(f"quick{number}", server=RESOLVER, until="answered").at - began)
        app.h1.docker("kill", f"quick{number}")
        began = time.monotonic()
        gone.append(ask(f"quick{number}", server=RESOLVER, until="gone").at - began)
    with capsys.disabled():
        for what, times in (("answered", come), ("gone", gone)):
            figures = f"median {median(times) * 1000:.0f} ms, 99th percentile {percentile(times, 99) * 1000:.0f} ms"
            print(f"\n{what} on the other host after docker's return: {figures}", end="")
    assert median(come) < QUICK
    assert median(gone) < QUICK
    assert max(come + gone) < QUICK * BUSY


def test_a_start_that_hangs_holds_up_no_other_name(app: Cluster, inside: Inside) -> None:
    """The engine keeps a paused weft's container to itself; the names of others on that host come nevertheless."""
    for number in range(20):
        app.h1.docker("create", "--name", f"many{number}", "--network", "app", IMAGE)
    app.h1.docker("start", *(f"many{number}" for number in range(20)), timeout=120)
    began = time.monotonic()
    ask = inside(app.h2, "web2")
    for number in range(20):
        assert ask(f"many{number}", until="answered").answers
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("end", [Host.stop_weft, Host.kill_weft])
def test_external_names_are_as_quick_without_weft(app: Cluster, inside: Inside, end: Callable[[Host], None]) -> None:
    """As from a container that never asks it, and at once."""
    app.run(app.h2, "own", "app", "--dns", app.lab.plan.gateway)
    ask, other = inside(app.h2, "web2"), inside(app.h2, "own")
    assert ask("web1", until="answered").answers
    end(app.h2)
    try:
        ask("gateway.lab")  # its last process may be ending while it has this one
        replies = [(ask("gateway.lab"), other("gateway.lab")) for _ in range(50)]
    finally:
        app.h2.start_weft()
    assert all(one.answers for pair in replies for one in pair)
    ours, plain = (median(one.took for one in column) for column in zip(*replies, strict=True))
    assert ours < BUSY * plain + 0.01
    assert max(one.took for one, _ in replies) < NO_WAIT
    assert ask("web1", until="answered").answers


def test_names_after_a_restart_of_weft_and_of_the_engine(app: Cluster, inside: Inside) -> None:
    ask = inside(app.h2, "web2")
    app.h2.kill_weft()
    app.h1.docker("rename", "web1", "fresh")
    app.h1.restart_weft()
    app.h2.start_weft()
    assert ask("fresh", until="answered").answers == [app.address(app.h1, "fresh", "app")]
    assert ask("web1", until="gone").answers == []
    app.h1.kill_weft()
    app.h1.docker("rename", "fresh", "again")  # nobody follows
    app.h1.start_weft()
    assert ask("again", until="answered").answers
    app.h2.stop_engine()
    app.h2.start_engine()
    app.h2.docker("start", "web2")
    assert inside(app.h2, "web2")("again", until="answered").answers


def test_a_firewall_between_containers_and_the_resolver_is_named(app: Cluster, inside: Inside) -> None:
    chain = "add chain inet filtered input { type filter hook input priority -200; }"
    rule = f"add rule inet filtered input ip daddr {RESOLVER} udp dport 53 drop"
    app.h1.restart_weft()  # nobody has asked it yet
    app.h1.run("nft", f"add table inet filtered; {chain}; {rule}")
    try:
        eventually(lambda: "a firewall on this host filters" in app.h1.log("weft"), "it is named", timeout=40)
    finally:
        app.h1.run("nft", "delete table inet filtered")
    eventually(lambda: "containers reach the resolver again" in app.h1.log("weft"), "and its end", timeout=40)


def test_an_engine_set_up_by_weft_setup_dns(app: Cluster, inside: Inside) -> None:
    """The host's own servers follow ours; a second time there is nothing to do."""
    options, file = dict(app.h2.engine_options), app.h2.data / "daemon.json"
    file.write_text(json.dumps({name: value for name, value in options.items() if name != "dns"}, indent=4))
    command = [sys.executable, "-m", "weft", "setup", "dns", "--file", str(file)]
    environment = {"PYTHONPATH": str(PROJECT / "plugin")}
    shown = app.h2.run(*command, "--dry-run", env=environment)
    assert f'+    "dns": ["{RESOLVER}", "{app.lab.plan.gateway}"]' in shown
    assert "dns" not in json.loads(file.read_text())
    assert "systemctl restart docker" in app.h2.run(*command, env=environment)
    assert "right as it is" in app.h2.run(*command, env=environment)
    app.h2.engine_options = json.loads(file.read_text())
    assert app.h2.engine_options == options
    app.h2.stop_engine()
    app.h2.start_engine()
    app.h2.docker("start", "web2")
    assert inside(app.h2, "web2")("web1", until="answered").answers


def test_names_of_a_dead_host_come_last(app: Cluster, inside: Inside) -> None:
    app.h1.docker("run", "-d", "--name", "shop1", "--network", "app", "--network-alias", "svc", IMAGE)
    living = app.run(app.h2, "shop2", "app", "--network-alias", "svc")
    ask = inside(app.h2, "web2")
    eventually(lambda: len(ask("svc", server=RESOLVER).answers) == 2, "both")
    alone = ask("web1").answers
    app.h1.crash()
    try:
        eventually(lambda: ask("svc", server=RESOLVER).answers == [living], "only the living one", timeout=30)
        assert ask("web1").answers == alone  # there is no other
    finally:
        app.h1.boot()
