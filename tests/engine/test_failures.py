"""What fails, and what that costs: stores, hosts, links, clocks and addresses; three hosts over three members of etcd.

Containers ping each other every 20 ms throughout. The figures are asserted, printed and recorded as properties.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

import pytest

from lab import CommandFailed, Host, Lab
from tests.engine.agreement import differences, kernel_facts
from tests.engine.conftest import eventually, reaches
from tests.engine.three import SUBNET, Addresses, Arrivals, Starts, Three, kernel_changes, refusal, undisturbed

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

LEASE = 10.0
GRACE = 15.0
REFUSED_WITHIN = 2.0
BACK_WITHIN = 5.0

Note = Callable[[str, float], None]


@pytest.fixture(scope="module")
def three(request: pytest.FixtureRequest) -> Iterator[Three]:
    settings = {"WEFT_GC_GRACE": "1", "WEFT_HOST_GRACE": str(GRACE), "WEFT_PROBE_INTERVAL": "0"}
    with Lab(hosts=3, name="failures", store="etcd", settings=settings) as lab:
        three = Three(lab)
        yield three
        if request.session.testsfailed:
            for host in lab.hosts:
                print(f"--- weft on {host.name}\n{host.log('weft')[-6000:]}")


@pytest.fixture
def addresses(three: Three) -> Iterator[Addresses]:
    """Of the containers web-h1, web-h2 and web-h3 on the network `app`, which reach each other."""
    three.repair()
    three.network("app", subnet=SUBNET)
    addresses = Addresses({host: three.run(host, f"web-{host.name}", "app") for host in three.lab.hosts})
    addresses.all_reach()
    yield addresses
    three.repair()


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Record a figure."""

    def record(what: str, value: float) -> None:
        record_property(what, round(value, 3))
        print(f"{what}: {value:.3f}")

    return record


# The store


def test_an_encrypted_network_needs_a_store_with_tls_or_somebodys_word(three: Three) -> None:
    """This etcd has none."""
    three.repair()
    create = ("network", "create", "-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET, "-o", "encrypted", "app")
    with pytest.raises(CommandFailed, match=r"encrypted networks need a store with TLS.*WEFT_ALLOW_PLAIN_STORE=1"):
        three.h1.docker(*create)
    assert three.keys("topology/networks/") == three.keys("ipam/") == []
    for host in three.ids:
        assert "weft-wg" not in host.run("nsenter", "--net=/run/docker/weft/wg", "ip", "-o", "link")
    try:
        for host in three.ids:
            host.stop_weft()
            host.start_weft({"WEFT_ALLOW_PLAIN_STORE": "1"})
        three.network("app", "-o", "encrypted", subnet=SUBNET)
        addresses = Addresses({host: three.run(host, f"web-{host.name}", "app") for host in three.ids})
        with three.h2.capture("udp port 4789") as lines:
            addresses.all_reach()
        assert not any(lines)
    finally:
        three.repair()
        for host in three.ids:
            host.restart_weft()


@pytest.mark.parametrize(("how", "outage"), [("killed", 60.0), ("frozen", LEASE + 5)])
def test_without_the_store_all_goes_on_but_what_needs_it(
    three: Three, addresses: Addresses, note: Note, how: str, outage: float
) -> None:
    away, back = (three.etcd.kill, three.etcd.start) if how == "killed" else (three.etcd.freeze, three.etcd.thaw)
    doomed = three.run(three.h1, "doomed", "app")
    eventually(lambda: three.has_row(three.h2, doomed), "h2 knows doomed")
    with addresses.traffic() as counts:
        began = time.monotonic()
        away()
        refused_at_first = three.refused(three.h2)
        removing = time.monotonic()
        three.h1.docker("rm", "-f", "doomed")
        note("docker rm -f, seconds", time.monotonic() - removing)
        time.sleep(max(0.0, began + outage - time.monotonic()))
        _name_the_store_in_time(three, [refused_at_first, three.refused(three.h2), three.refused(three.h1)], note)
        assert three.has_row(three.h2, doomed)
        note("store away, seconds", time.monotonic() - began)
        back()
        began = time.monotonic()
        eventually(lambda: not _knows(three, doomed), "doomed is gone from the store", timeout=BACK_WITHIN)
        for host in (three.h2, three.h3):
            eventually(lambda h=host: not three.has_row(h, doomed), f"and from {host.name}", timeout=BACK_WITHIN)  # type: ignore[misc]
        address = three.run(three.h3, "fresh", "app")
        eventually(lambda: reaches(three.h1, "web-h1", address), "a new container is reached", timeout=BACK_WITHIN)
        eventually(lambda: three.alive() == {"h1", "h2", "h3"}, "all hosts are alive", timeout=BACK_WITHIN)
        note("all is right again after, seconds", time.monotonic() - began)
        assert time.monotonic() - began < BACK_WITHIN
    assert [count.lost for count in counts] == [0, 0, 0]
    assert "is forgotten" not in "".join(host.log("weft") for host in three.lab.hosts)


def _name_the_store_in_time(three: Three, refusals: Sequence[tuple[str, float]], note: Note) -> None:
    """:param refusals: see `Three.refused`; of several one has to be in time, for the machine may be busy."""
    for message, seconds in refusals:
        note("docker run is refused after, seconds", seconds)
        assert any(member.address in message for member in three.etcd.members), message
    assert min(seconds for _, seconds in refusals) < REFUSED_WITHIN


def _knows(three: Three, address: str) -> list[str]:
    """Keys of an address's allocation and its endpoint."""
    return [key for key, value in three.etcd.entries().items() if key.endswith(f"/{address}") or address in value]


def test_no_event_is_missed_when_etcd_loses_its_leader(three: Three, addresses: Addresses, note: Note) -> None:
    with addresses.traffic() as counts, Arrivals(three.h2) as arrivals, Starts(three, three.h1) as starts:
        starts.more(2, timeout=10)
        three.etcd.leader.kill()
        starts.more(3, timeout=15)
    _all_arrive(three, starts, arrivals, note)
    assert [count.lost for count in counts] == [0, 0, 0]


def test_no_event_is_missed_from_a_member_that_has_lost_the_others(
    three: Three, addresses: Addresses, note: Note
) -> None:
    """Each of the members in turn, so that each host's watch is on one of them once."""
    with addresses.traffic() as counts, Arrivals(three.h2) as arrivals, Starts(three, three.h1) as starts:
        for member in three.etcd.members:
            starts.more(1, timeout=10)
            others = [other for other in three.etcd.members if other is not member]
            member.cut_from(*others)
            eventually(lambda m=member: not m.serves(), f"{member.name} has lost the others")  # type: ignore[misc]
            starts.more(2, timeout=15)
            member.restore_to(*others)
            eventually(member.serves, f"{member.name} is back")
    _all_arrive(three, starts, arrivals, note)
    assert [count.lost for count in counts] == [0, 0, 0]


def _all_arrive(three: Three, starts: Starts, arrivals: Arrivals, note: Note) -> None:
    for host in (three.h2, three.h3):
        eventually(
            lambda h=host: all(three.has_row(h, address) for address in starts.addresses),  # type: ignore[misc]
            f"{host.name} has a row for each container",
            timeout=BACK_WITHIN,
        )
    note("containers started", len(starts.addresses))
    note("starts refused meanwhile", starts.refused)
    note("longest time from a start to its row on another host, seconds", arrivals.lag(starts))
    assert arrivals.lag(starts) < BACK_WITHIN


# Hosts


def test_a_dead_host_is_respected_for_the_grace_then_collected_and_adopted_again(
    three: Three, addresses: Addresses, note: Note
) -> None:
    lost = addresses[three.h3]
    three.h3.docker("update", "--restart", "always", "web-h3")
    with addresses.only(three.h1, three.h2).traffic() as counts:
        began = time.monotonic()
        three.h3.crash()
        assert lost in three.refused(three.h1, "--ip", lost)[0]
        eventually(lambda: "h3" not in three.alive(), "h3 is silent", timeout=LEASE + 3)
        silent = time.monotonic()
        note("silent after, seconds", silent - began)
        assert _shown(three.h1)["h3"] == "silent"
        assert lost in three.refused(three.h2, "--ip", lost)[0]
        assert three.has_row(three.h1, lost)
        assert "host h3 (" in refusal(three.h2, {"WEFT_HOSTNAME": "h3"})
        with _second_address(three.h2, three.h3.address):
            assert "host h3 (" in refusal(three.h2, {"WEFT_UNDERLAY": three.h3.address})
        three.h2.start_weft()
        counting = time.monotonic()  # it begins anew with the weft that does it, which may be this one
        eventually(lambda: not three.mentions(three.h3), "all of h3 is collected", timeout=GRACE + 9)
        note("collected so long after it fell silent, seconds", time.monotonic() - silent)
        note("and so long after weft was started on h2, seconds", time.monotonic() - counting)
        assert time.monotonic() - silent > GRACE - 1
        for host in (three.h1, three.h2):
            eventually(lambda h=host: not three.has_row(h, lost), f"{host.name}'s rows of it go")  # type: ignore[misc]
        assert three.run(three.h1, "heir", "app", "--ip", lost) == lost
        three.h3.boot()
        eventually(lambda: three.address(three.h3, "web-h3", "app") not in ("", lost), "web-h3 runs", timeout=20)
        addresses[three.h3] = three.address(three.h3, "web-h3", "app")
        addresses.all_reach()
    assert [count.lost for count in counts] == [0, 0]
    assert reaches(three.h3, "web-h3", lost)
    assert len([k for k in three.keys("topology/members/") if three.ids[three.h3] in k]) == 1


@contextmanager
def _second_address(host: Host, address: str) -> Iterator[None]:
    """One that a host has, but does not tell anybody on the underlay."""
    arp = "/proc/sys/net/ipv4/conf/eth0/arp_ignore"
    add = f'echo 1 > {arp}; ip link add second type bridge; ip addr add "$0/32" dev second; ip link set second up'
    host.run("sh", "-ec", add, address)
    yield
    host.run("sh", "-ec", f"ip link del second; echo 0 > {arp}")


def _shown(host: Host) -> dict[str, str]:
    """`weft host ls`: states by name."""
    return {
        one["name"]: "alive" if one["alive"] else "silent" for one in json.loads(host.ask_weft("host", "ls", "--json"))
    }


def test_a_host_that_is_forgotten_by_hand_is_gone_at_once(three: Three, addresses: Addresses, note: Note) -> None:
    three.h3.crash()
    with pytest.raises(CommandFailed, match=r"h3 .*is alive"):
        three.h1.ask_weft("host", "forget", "h3")
    began = time.monotonic()
    assert "h3" in three.h1.ask_weft("host", "forget", "h3", "--force")
    note("weft host forget, seconds", time.monotonic() - began)
    assert three.mentions(three.h3) == []
    assert "h3" not in _shown(three.h2)
    lost = addresses[three.h3]
    assert three.run(three.h1, "heir", "app", "--ip", lost) == lost


def test_a_host_that_returns_within_the_grace_finds_all_its_own(three: Three, addresses: Addresses, note: Note) -> None:
    mine = three.run(three.h3, "mine", "app", "--restart", "always", "--ip", "10.77.0.200")
    stopped = three.run(three.h3, "stopped", "app")
    lasting = ("topology/hosts/", "topology/networks/", "topology/members/", "ipam/pools/")
    before = {prefix: three.etcd.entries(prefix) for prefix in lasting}
    with addresses.only(three.h1, three.h2).traffic() as counts:
        three.h3.crash()
        eventually(lambda: "h3" not in three.alive(), "h3 is silent", timeout=LEASE + 3)
        assert stopped in three.refused(three.h1, "--ip", stopped)[0]
        three.h3.boot()
        eventually(lambda: reaches(three.h1, "web-h1", mine), "mine is back at its address", timeout=20)
        three.h3.docker("start", "web-h3")
        addresses[three.h3] = three.address(three.h3, "web-h3", "app")
        addresses.all_reach()
        assert {prefix: three.etcd.entries(prefix) for prefix in lasting} == before
    assert [count.lost for count in counts] == [0, 0]


def test_a_host_that_was_cut_off_and_collected_returns_without_a_double_address(
    three: Three, addresses: Addresses, note: Note
) -> None:
    given = three.run(three.h3, "robbed", "app")
    with addresses.only(three.h1, three.h2).traffic() as counts:
        three.h3.cut_link()
        eventually(lambda: not three.mentions(three.h3), "all of h3 is collected", timeout=LEASE + GRACE + 15)
        assert three.run(three.h1, "heir", "app", "--ip", given) == given
        three.h3.restore_link()
        began = time.monotonic()
        addresses.all_reach(timeout=20)
        note("adopted again after, seconds", time.monotonic() - began)
    assert [count.lost for count in counts] == [0, 0]
    assert reaches(three.h3, "web-h3", given)
    cut_off = lambda: given not in three.h3.docker("exec", "robbed", "ip", "addr")  # noqa: E731
    eventually(cut_off, "robbed has the address no more", timeout=40)
    three.h3.docker("restart", "-t", "0", "robbed")
    assert three.address(three.h3, "robbed", "app") != given
    assert reaches(three.h1, "web-h1", three.address(three.h3, "robbed", "app"))


def test_a_host_whose_weft_is_stopped_keeps_all_as_long_as_it_answers_pings(
    three: Three, addresses: Addresses, note: Note
) -> None:
    """Its kernel and its containers are well: `stop it and traffic goes on`."""
    held = addresses[three.h3]

    def said() -> int:
        return three.h1.log("weft").count("gives no sign of life, but it answers pings")

    before = said()
    with addresses.traffic() as counts:
        three.h3.stop_weft()
        eventually(lambda: "h3" not in three.alive(), "h3 is silent", timeout=LEASE + 3)
        eventually(lambda: said() > before, "h3 is known to be up", timeout=8)
        time.sleep(GRACE + 5)  # nothing may happen, so there is nothing to wait for
        assert held in three.refused(three.h1, "--ip", held)[0]
        for host in (three.h1, three.h2):
            assert three.has_row(host, held)
        due = json.loads(three.h1.ask_weft("gc", "--dry-run", "--json"))
        (h3,) = (one for one in due if one["what"].startswith("host h3 "))
        assert (h3["seconds"], "weft host forget h3" in h3["why"]) == (None, True)
    assert [count.lost for count in counts] == [0, 0, 0]
    three.h3.cut_link()
    began = time.monotonic()
    eventually(lambda: not three.mentions(three.h3), "all of h3 is collected", timeout=GRACE + 15)
    note("collected so long after its link was cut, seconds", time.monotonic() - began)
    assert said() == before + 1


def test_a_host_reboots_while_the_store_is_away(three: Three, addresses: Addresses, note: Note) -> None:
    three.h3.docker("update", "--restart", "always", "web-h3")
    eventually(lambda: not differences({three.ids[three.h3]: three.h3}, three.etcd.entries()), "all is calm", 30)
    eventually(lambda: _is_saved(three.h3, addresses[three.h1]), "h3 has written down what it knows")
    known = {fact for fact in kernel_facts(three.h3) if " wp" not in fact}
    with addresses.only(three.h1, three.h2).traffic() as counts:
        three.etcd.kill()
        three.h3.crash()
        boot = Thread(target=three.h3.boot)
        boot.start()
        began = time.monotonic()
        eventually(lambda: _has_dataplane(three.h3) and known <= kernel_facts(three.h3), "the data plane is back", 60)
        note("data plane restored without a store after, seconds", time.monotonic() - began)
        three.etcd.start()
        boot.join(timeout=60)
        eventually(lambda: three.address(three.h3, "web-h3", "app") != "", "web-h3 runs", timeout=20)
        addresses[three.h3] = three.address(three.h3, "web-h3", "app")
        addresses.all_reach()
    assert [count.lost for count in counts] == [0, 0]


def _is_saved(host: Host, address: str) -> bool:
    file = host.data / "weft/snapshot.json"
    return file.exists() and address in file.read_text()


def _has_dataplane(host: Host) -> bool:
    return host.up and host.weft.pid is not None


# Links


def test_a_host_that_loses_the_store_alone_keeps_everything(three: Three, addresses: Addresses, note: Note) -> None:
    before = three.keys("topology/endpoints/"), three.etcd.entries("ipam/")
    with addresses.traffic() as counts:
        with undisturbed(*three.lab.hosts):
            three.h3.cut_from(*three.etcd.members)
            began = time.monotonic()
            eventually(lambda: "h3" not in three.alive(), "h3 is silent", timeout=LEASE + 3)
            _name_the_store_in_time(three, [three.refused(three.h3) for _ in range(3)], note)
            time.sleep(max(0.0, began + LEASE + 4 - time.monotonic()))
            assert (three.keys("topology/endpoints/"), three.etcd.entries("ipam/")) == before
        with kernel_changes(three.h2) as seen:
            late = three.run(three.h1, "late", "app")
            eventually(lambda: three.has_row(three.h2, late), "h2 learns of a container meanwhile")
        assert any(late in line for line in seen), "changes would have been seen above"
        three.h3.restore_to(*three.etcd.members)
        began = time.monotonic()
        eventually(lambda: three.has_row(three.h3, late), "h3 learns what it missed", timeout=BACK_WITHIN)
        eventually(lambda: three.alive() == {"h1", "h2", "h3"}, "h3 is alive", timeout=BACK_WITHIN)
        note("all is right again after, seconds", time.monotonic() - began)
        assert three.starts(three.h3)
    assert [count.lost for count in counts] == [0, 0, 0]


def test_hosts_that_lose_each_other_alone_keep_everything(three: Three, addresses: Addresses, note: Note) -> None:
    """The circle of pings is h1, h2, h3: only its first way is cut."""
    with addresses.traffic() as counts, undisturbed(*three.lab.hosts):
        three.h1.cut_from(three.h2)
        time.sleep(BACK_WITHIN)
        assert three.alive() == {"h1", "h2", "h3"}
        three.h1.restore_to(three.h2)
        eventually(lambda: reaches(three.h1, "web-h1", addresses[three.h2]), "h1 reaches h2 again")
    note("lost on the way that was cut, seconds", counts[0].gap)
    assert counts[0].gap > BACK_WITHIN - 1
    assert [count.lost for count in counts[1:]] == [0, 0]


# Clocks, addresses, doubles


def test_clocks_that_are_an_hour_off_break_nothing(three: Three, addresses: Addresses, note: Note) -> None:
    offsets = {three.h2: 3600, three.h3: -3600}
    try:
        with addresses.traffic() as counts:
            for host, offset in offsets.items():
                host.clock_offset = offset
                host.restart_weft()
            began = time.monotonic()
            three.network("other", subnet="10.78.0.0/24", on=three.h2)
            for host in three.lab.hosts:
                three.run(host, f"other-{host.name}", "other")
            there = three.address(three.h2, "other-h2", "other")
            eventually(lambda: reaches(three.h1, "other-h1", there), "h1 reaches h2")
            assert three.starts(three.h3)
            while time.monotonic() < began + LEASE + 2:  # whoever mistook the time would have been silent by now
                assert three.alive() == {"h1", "h2", "h3"}
            assert reaches(three.h3, "other-h3", there)
        assert [count.lost for count in counts] == [0, 0, 0]
    finally:
        for host in offsets:
            host.clock_offset = 0
            host.restart_weft()


def test_a_host_whose_underlay_address_changes_is_followed(three: Three, addresses: Addresses, note: Note) -> None:
    old, new = three.h2.address, str(three.lab.plan.network[102])
    try:
        with addresses.traffic() as counts:
            for address in (new, old):
                former = three.h2.address
                three.h2.change_address(address)
                began = time.monotonic()
                for host in (three.h1, three.h3):
                    eventually(lambda h=host, a=address: _uses(h, a), f"{host.name} uses {address}")  # type: ignore[misc]
                eventually(lambda a=address: _uses(three.h2, a), "h2 as well")  # type: ignore[misc]
                eventually(lambda: reaches(three.h1, "web-h1", addresses[three.h2]), "h1 reaches h2")
                note("followed after, seconds", time.monotonic() - began)
                assert not any(_uses(host, former) for host in three.lab.hosts)
                assert f'"{address}"' in three.etcd.entries(f"topology/hosts/{three.ids[three.h2]}").popitem()[1]
            addresses.all_reach()
    finally:
        if three.h2.address != old:
            three.h2.change_address(old)
    note("longest gap, seconds", max(counts[0].gap, counts[1].gap))
    assert max(counts[0].gap, counts[1].gap) < 10
    assert counts[2].lost == 0


def _uses(host: Host, underlay: str) -> bool:
    """Whether the data plane sends to, or from, an underlay address."""
    return any(f" via {underlay} " in fact or f" from {underlay} " in fact for fact in kernel_facts(host))


def test_a_second_host_of_the_same_id_name_or_address_is_refused(three: Three, addresses: Addresses) -> None:
    file, twin = three.h3.data / "weft/host-id", three.h1.data / "weft/host-id"
    own = file.read_text()
    with addresses.only(three.h1, three.h2).traffic() as counts:
        assert "host h1 (" in refusal(three.h3, {"WEFT_HOSTNAME": "h1"})
        with _second_address(three.h3, three.h1.address):
            assert "host h1 (" in refusal(three.h3, {"WEFT_UNDERLAY": three.h1.address})
        try:
            file.write_text(twin.read_text())
            assert "host h1 (" in refusal(three.h3, {})
        finally:
            file.write_text(own)
        three.h3.start_weft()
        assert three.starts(three.h3)
        assert three.alive() == {"h1", "h2", "h3"}
    assert [count.lost for count in counts] == [0, 0]
