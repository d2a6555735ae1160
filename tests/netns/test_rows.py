"""The bulk tables, judged by `bridge` and `ip`."""

from __future__ import annotations

import errno
from contextlib import closing
from functools import partial

import pytest

from tests.netns.world import MTU, Host, World
from weft.dataplane import FLOOD_MAC, Fdb, Neighbour, Port, Row, Station, pack_address, pack_mac
from weft.errors import KernelError
from weft.kernel.netlink import Rtnetlink, open_socket
from weft.kernel.rows import UNKNOWN_VTEP, Rows
from weft.reconcile import Create, RowPlan, plan_rows

DEVICES = ("br7", "vx7")
MAC = "02:42:0a:00:00:02"
OTHER_MAC = "02:42:0a:00:00:03"


def fdb(mac: str, vtep: str) -> Fdb:
    return Fdb("vx7", pack_mac(mac), pack_address(vtep))


def flood(vtep: str) -> Fdb:
    return Fdb("vx7", FLOOD_MAC, pack_address(vtep))


def station(mac: str) -> Station:
    return Station("vx7", pack_mac(mac))


def neighbour(address: str, mac: str) -> Neighbour:
    return Neighbour("br7", pack_address(address), pack_mac(mac))


def endpoint(number: int) -> set[Row]:
    """All rows of one remote endpoint."""
    mac = (0x02420A000000 + number).to_bytes(6, "big")
    return {
        Fdb("vx7", mac, pack_address(f"192.0.2.{2 + number % 7}")),
        Station("vx7", mac),
        Neighbour("br7", (0x0A000000 + number).to_bytes(4, "big"), mac),
        Neighbour("br7", (0xFD00 << 112 | number).to_bytes(16, "big"), mac),
    }


@pytest.fixture
def network(host: Host) -> Host:
    """A host with network 7 and a port on it."""
    host.apply(*host.network(7), Port("wp1", "br7", MTU, peer="wc1"))
    return host


@pytest.mark.kernel
def test_fresh_devices_have_no_rows(network: Host) -> None:
    """Their own MACs and their multicast addresses are there, but not ours to see."""
    assert network.dp.fdb("br7")
    assert network.dp.fdb("vx7")
    network.dp.ip("addr add fe80::7/64 dev br7 nodad")
    assert not network.observe(*DEVICES)


@pytest.mark.kernel
def test_rows_are_put_and_observed(network: Host) -> None:
    rows: set[Row] = {
        flood("192.0.2.2"),
        flood("192.0.2.3"),
        fdb(MAC, "192.0.2.2"),
        station(MAC),
        neighbour("10.0.0.2", MAC),
        neighbour("fd00::2", MAC),
    }
    network.put(*rows)
    assert network.observe(*DEVICES) == rows
    assert not plan_rows(rows, network.observe(*DEVICES))


@pytest.mark.kernel
def test_rows_as_bridge_and_ip_see_them(network: Host) -> None:
    network.put(fdb(MAC, "192.0.2.2"), station(MAC), neighbour("10.0.0.2", MAC), neighbour("fd00::2", MAC))
    network.put(flood("192.0.2.2"), flood("192.0.2.3"))

    entries = {(e["mac"], e.get("dst"), e.get("master"), e["state"]) for e in network.dp.fdb("vx7")}
    neighbours = {(n["dst"], n["lladdr"]) for n in network.dp.neighbours("br7")}

    assert entries - {(network.dp.link("vx7")["address"], None, "br7", "permanent")} == {
        (MAC, "192.0.2.2", None, "permanent"),
        (MAC, None, "br7", "static"),
        ("00:00:00:00:00:00", "192.0.2.2", None, "permanent"),
        ("00:00:00:00:00:00", "192.0.2.3", None, "permanent"),
    }
    assert neighbours == {("10.0.0.2", MAC), ("fd00::2", MAC)}


def test_vteps_may_be_ipv6(world: World) -> None:
    host = world.host("2001:db8::1/64")
    host.apply(*host.network(7))
    rows: set[Row] = {fdb(MAC, "2001:db8::2"), flood("2001:db8::2"), flood("2001:db8::3"), station(MAC)}

    host.put(*rows)

    assert host.observe(*DEVICES) == rows
    assert {e["dst"] for e in host.dp.fdb("vx7") if "dst" in e} == {"2001:db8::2", "2001:db8::3"}
    host.put(fdb(MAC, "2001:db8::3"))
    assert host.observe(*DEVICES) == rows - {fdb(MAC, "2001:db8::2")} | {fdb(MAC, "2001:db8::3")}


@pytest.mark.kernel
def test_row_with_new_content_replaces_the_old_one(network: Host) -> None:
    network.put(fdb(MAC, "192.0.2.2"), station(MAC), neighbour("10.0.0.2", MAC))
    network.put(fdb(MAC, "192.0.2.3"), station(MAC), neighbour("10.0.0.2", OTHER_MAC))
    assert network.observe(*DEVICES) == {
        fdb(MAC, "192.0.2.3"),
        station(MAC),
        neighbour("10.0.0.2", OTHER_MAC),
    }


def test_deleting_and_putting_twice_is_done(network: Host) -> None:
    rows = (*endpoint(1), flood("192.0.2.2"))
    for _ in range(2):
        network.put(*rows)
        assert network.observe(*DEVICES) == set(rows)
    for _ in range(2):
        network.kernel.write_rows(RowPlan(delete=rows))
        assert not network.observe(*DEVICES)


FOREIGN: list[tuple[str, Row]] = [
    (f"bridge fdb add {MAC} dev vx7 dst 192.0.2.9 self", fdb(MAC, "192.0.2.9")),
    (f"bridge fdb add {MAC} dev vx7 dst 192.0.2.9 self static", fdb(MAC, "192.0.2.9")),
    (f"bridge fdb add {MAC} dev vx7 master static", station(MAC)),
    (f"bridge fdb add {MAC} dev vx7 master permanent", Station("vx7", pack_mac(MAC), local=True)),
    (f"bridge fdb add {MAC} dev br7 self permanent", Station("br7", pack_mac(MAC), local=True)),
    (f"ip neigh add 10.0.0.9 dev br7 lladdr {MAC} nud permanent", neighbour("10.0.0.9", MAC)),
    (f"ip neigh add fd00::9 dev br7 lladdr {MAC} nud permanent", neighbour("fd00::9", MAC)),
    (f"bridge fdb add {MAC} dev vx7 dst 192.0.2.9 port 999 self", Fdb("vx7", pack_mac(MAC), UNKNOWN_VTEP)),
    (f"bridge fdb add {MAC} dev vx7 dst 192.0.2.9 vni 8 self", Fdb("vx7", pack_mac(MAC), UNKNOWN_VTEP)),
]


@pytest.mark.kernel
def test_foreign_rows_are_seen_and_removed(network: Host) -> None:
    wanted = endpoint(1)
    network.put(*wanted)
    for command, row in FOREIGN:
        network.dp.run(*command.split())
        assert network.observe(*DEVICES) == wanted | {row}, command

        network.set_rows(wanted, *DEVICES)
        assert network.observe(*DEVICES) == wanted, command


IN_OUR_PLACE = [
    f"bridge fdb add {MAC} dev vx7 dst 192.0.2.2 port 999 self",
    f"bridge fdb add {MAC} dev vx7 dst 192.0.2.2 vni 8 self",
    f"bridge fdb add {MAC} dev vx7 dst 192.0.2.9 self",
    f"bridge fdb add {MAC} dev vx7 dst 192.0.2.2 self dynamic",
    f"bridge fdb add {MAC} dev vx7 master permanent",
    f"bridge fdb add {MAC} dev vx7 master dynamic",
    f"bridge fdb add {MAC} dev wp1 master static",
    f"ip neigh add 10.0.0.2 dev br7 lladdr {OTHER_MAC} nud permanent",
    f"ip neigh add 10.0.0.2 dev br7 lladdr {MAC} nud noarp",
]


@pytest.mark.kernel
def test_foreign_rows_in_our_place_are_put_right(network: Host) -> None:
    wanted: set[Row] = {fdb(MAC, "192.0.2.2"), station(MAC), neighbour("10.0.0.2", MAC)}
    for command in IN_OUR_PLACE:
        network.dp.run(*command.split())

        network.set_rows(wanted, *DEVICES)

        assert network.observe(*DEVICES) == wanted, command
        entries = [(e["state"], e.get("dst"), e.get("port")) for e in network.dp.fdb("vx7") if e["mac"] == MAC]
        assert sorted(entries) == [("permanent", "192.0.2.2", None), ("static", None, None)], command
        network.set_rows(set(), *DEVICES)


def test_entry_with_several_vteps_is_several_rows(network: Host) -> None:
    """The kernel allows this for group addresses only: appending to a unicast MAC is refused."""
    group = "01:00:5e:00:00:07"
    for vtep in ("192.0.2.8", "192.0.2.9"):
        network.dp.bridge(f"fdb append {group} dev vx7 dst {vtep} self")
    assert network.observe("vx7") == {fdb(group, "192.0.2.8"), fdb(group, "192.0.2.9")}

    network.kernel.write_rows(RowPlan(delete=(fdb(group, "192.0.2.8"),)))
    assert network.observe("vx7") == {fdb(group, "192.0.2.9")}


def test_entry_with_a_nexthop_group_is_seen_and_removed(network: Host) -> None:
    network.ip("nexthop add id 1 via 192.0.2.9 fdb")
    network.ip("nexthop add id 2 group 1 fdb")
    network.dp.bridge(f"fdb add {MAC} dev vx7 nhid 2 self")
    assert network.observe("vx7") == {Fdb("vx7", pack_mac(MAC), UNKNOWN_VTEP)}

    network.set_rows({fdb(MAC, "192.0.2.2")}, "vx7")
    assert network.observe("vx7") == {fdb(MAC, "192.0.2.2")}


@pytest.mark.kernel
def test_learned_rows_are_not_seen(network: Host) -> None:
    network.dp.bridge(f"fdb add {MAC} dev vx7 master dynamic")
    network.dp.bridge(f"fdb add {OTHER_MAC} dev vx7 dst 192.0.2.9 self dynamic")
    network.dp.ip(f"neigh add 10.0.0.9 dev br7 lladdr {MAC} nud stale")
    assert not network.observe(*DEVICES)


def test_only_the_devices_asked_for_are_read(network: Host) -> None:
    links = [link for vni in range(7, 12) for link in network.network(vni)]
    network.apply(*links)
    rows: set[Row] = set()
    for vni in range(7, 12):
        rows.add(Fdb(f"vx{vni}", pack_mac(MAC), pack_address("192.0.2.2")))
        rows.add(Neighbour(f"br{vni}", pack_address("10.0.0.2"), pack_mac(MAC)))
    network.put(*rows)

    assert network.observe("vx8") == {row for row in rows if row.device == "vx8"}
    assert network.observe("br8", "vx8") == {row for row in rows if row.device in ("br8", "vx8")}
    some = {link.name for link in links} - {"br9", "vx10"}
    assert network.observe(*some, "br99") == {row for row in rows if row.device in some}


def test_large_tables_are_read_whole(network: Host) -> None:
    """Both ways of parsing: chunks of one form, and those where forms meet."""
    rows = {row for number in range(1, 2000) for row in endpoint(number)}
    rows |= {flood(f"192.0.2.{number}") for number in range(2, 250)}
    network.put(*rows)
    network.dp.bridge(f"fdb replace {endpoint_mac(1000)} dev vx7 dst 192.0.2.250 port 999 self")
    network.dp.bridge("fdb add 02:42:ff:00:00:01 dev vx7 master permanent")

    seen = network.observe(*DEVICES)

    odd = Fdb("vx7", pack_mac(endpoint_mac(1000)), UNKNOWN_VTEP)
    local = Station("vx7", pack_mac("02:42:ff:00:00:01"), local=True)
    usual = next(row for row in endpoint(1000) if isinstance(row, Fdb))
    assert seen == rows - {usual} | {odd, local}
    network.set_rows(rows, *DEVICES)
    assert network.observe(*DEVICES) == rows


def endpoint_mac(number: int) -> str:
    return next(row.mac for row in endpoint(number) if isinstance(row, Station)).hex(":")


def test_failed_row_is_named_and_the_rest_is_done(network: Host) -> None:
    missing: list[Row] = [Station("vx99", pack_mac(MAC)), Fdb("vx99", pack_mac(MAC), pack_address("192.0.2.2"))]
    rows = endpoint(1)

    with pytest.raises(KernelError) as failed:
        network.put(missing[0], *rows, missing[1])

    assert failed.value.errno == errno.ENODEV
    assert str(failed.value).startswith("put vx99 02:42:0a:00:00:02 behind the bridge port and 1 other rows: No such")
    assert network.observe(*DEVICES) == rows


def test_ipv6_on_too_small_an_mtu_is_explained(host: Host) -> None:
    host.apply(*host.network(7, mtu=1000))
    with pytest.raises(KernelError, match=r"put br7 fd00::2 is at .*: Invalid argument; IPv6 needs an MTU of 1280"):
        host.put(neighbour("10.0.0.2", MAC), neighbour("fd00::2", MAC))
    assert host.observe("br7") == {neighbour("10.0.0.2", MAC)}


def test_rows_of_a_missing_device_are_deleted_already(network: Host) -> None:
    network.kernel.write_rows(RowPlan(delete=(Station("vx99", pack_mac(MAC)),)))
    assert not network.observe("vx99")


def test_no_error_is_lost_in_a_small_receive_buffer(network: Host) -> None:
    opened = partial(network.dp.do, partial(open_socket, receive_buffer=1))
    rows = {row for number in range(1, 300) for row in endpoint(number)}
    missing = [Station("vx99", row.mac) for row in rows if isinstance(row, Station)]
    with closing(Rtnetlink(opened)) as lookup, closing(Rows(opened, lookup.find)) as small:
        small.write(RowPlan(delete=tuple(rows)))
        with pytest.raises(KernelError, match="and 298 other rows: No such device"):
            small.write(RowPlan(put=(*missing, *rows)))
    assert network.observe(*DEVICES) == rows


def test_broken_sockets_are_replaced(network: Host) -> None:
    broken = [network.kernel._lookup, network.kernel._rows._reader, network.kernel._rows._writer]
    row = station(MAC)
    network.put(row)
    assert network.observe(*DEVICES) == {row}
    for rtnetlink in broken:
        assert rtnetlink._socket
        rtnetlink._socket.close()

    for use in (
        partial(network.kernel.has_links, ["br7"]),
        partial(network.observe, "vx7"),
        partial(network.put, station(MAC)),
    ):
        with pytest.raises(KernelError, match="Bad file descriptor"):
            use()
        use()


def test_veth_is_made_while_rows_are_written(network: Host) -> None:
    """No lock of ours is held across both; see the package's head."""
    network.kernel._rows._writer._lock.acquire()
    network.kernel._rows._reader._lock.acquire()
    try:
        network.kernel.perform(Create(Port("wp2", "br7", MTU, peer="wc2")))
    finally:
        network.kernel._rows._writer._lock.release()
        network.kernel._rows._reader._lock.release()
    assert network.kernel.has_links(["wp2"])
