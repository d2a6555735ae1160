"""Rates of containers and networks, as users type them."""

from __future__ import annotations

import json
import re

from lab import Host
from tests.engine.conftest import IMAGE, Cluster, eventually, refusal
from tests.engine.traffic import BYTES, send

SUBNET = "10.77.0.0/24"
RATE = 4_000_000
SECONDS = BYTES * 8 / RATE
LEAST = SECONDS * 0.8
"""A rate that is kept may save what passes at once, and takes longer on a busy machine, never less."""


def run(host: Host, name: str, attachment: str) -> None:
    host.docker("run", "-d", "--name", name, "--network", attachment, IMAGE)


def rates(host: Host) -> dict[str, str | None]:
    """By container, as `weft endpoint ls` has them."""
    return {e["names"][0]: e["rate"] for e in json.loads(host.ask_weft("endpoint", "ls", "--json")) if e["names"]}


def limits(host: Host) -> list[tuple[str, str]]:
    """Links of the data plane with a rate, as `tc` says."""
    shown = host.dataplane("tc", "qdisc", "show")
    return sorted(re.findall(r"^qdisc tbf 1: dev (\S+) root .*rate (\S+) burst", shown, re.MULTILINE))


def link_of(host: Host, container: str) -> str:
    """The port of a container that has one network."""
    template = "{{range .NetworkSettings.Networks}}{{.EndpointID}}{{end}}"
    return "wp" + host.docker("inspect", "--format", template, container)[:12]


def test_rates_are_kept_in_both_directions_whatever_happens_to_weft(cluster: Cluster) -> None:
    h1, h2 = cluster.h1, cluster.h2
    chosen = "-o", "weft.rate=1mbit", "-o", "weft.multicast=2mbit", "-o", "weft.tx-checksum=off"
    cluster.network("app", *chosen, subnet=SUBNET)
    run(h1, "slow", "name=app,driver-opt=weft.rate=4mbit")
    run(h1, "free", "name=app,driver-opt=rate=off")
    run(h2, "other", "name=app,driver-opt=weft.rate=off")
    run(h2, "usual", "app")
    run(h2, "late", "none")
    h2.docker("network", "disconnect", "none", "late")
    h2.docker("network", "connect", "--driver-opt", "weft.rate=1gbit", "app", "late")

    expected = {"slow": "4mbit", "free": None, "other": None, "usual": "1mbit", "late": "1gbit"}
    eventually(lambda: rates(h2) == expected, "rates are told")
    assert "multicast=2mbit rate=1mbit tx-checksum=off" in h2.ask_weft("network", "inspect", "app")
    options = json.loads(h2.docker("network", "inspect", "app"))[0]["Options"]
    assert options == {"weft.rate": "1mbit", "weft.multicast": "2mbit", "weft.tx-checksum": "off"}
    tunnel = next(name for name in cluster.links(h1) if name.startswith("vx"))
    port = link_of(h1, "slow")
    wanted = sorted([(f"s{tunnel}", "2Mbit"), (port, "4Mbit"), (f"s{port}", "4Mbit")])
    assert limits(h1) == wanted

    there, here = cluster.address(h2, "other", "app"), cluster.address(h1, "slow", "app")
    assert send(h1, "slow", h2, "other", there) > LEAST
    assert send(h2, "other", h1, "slow", here) > LEAST

    h1.dataplane("tc", "qdisc", "del", "dev", port, "root")  # somebody meddles
    h1.dataplane("ip", "link", "del", f"s{port}")
    h1.dataplane("tc", "qdisc", "del", "dev", tunnel, "clsact")
    eventually(lambda: limits(h1) == wanted, "limits are put back")
    diverted = "tc", "filter", "show", "dev", tunnel, "egress"
    eventually(lambda: f"Redirect to device s{tunnel}" in h1.dataplane(*diverted), "floods are limited again")
    steps = h1.log("weft").count("rate limit")
    h1.restart_weft()
    assert json.loads(h1.ask_weft("plan", "--json")) == []
    assert limits(h1) == wanted
    assert h1.log("weft").count("rate limit") == steps
    assert send(h1, "slow", h2, "other", there) > LEAST

    h1.docker("restart", "-t", "0", "slow")
    port = link_of(h1, "slow")
    assert limits(h1) == sorted([(f"s{tunnel}", "2Mbit"), (port, "4Mbit"), (f"s{port}", "4Mbit")])
    h1.docker("rm", "-f", "slow")
    assert limits(h1) == [(f"s{tunnel}", "2Mbit")]


def test_a_rate_that_cannot_be_is_refused(cluster: Cluster) -> None:
    h1 = cluster.h1
    create = "network", "create", "-d", "weft", "--ipam-driver", "weft", "--subnet", SUBNET
    words = "must be off, or a rate as tc writes it, from 64kbit to 32gbit"
    assert f"option weft.rate=fast: {words}" in refusal(h1, *create, "-o", "weft.rate=fast", "app")
    assert "option weft.multicast=1: must be on, off, or a rate" in refusal(
        h1, *create, "-o", "weft.multicast=1", "app"
    )
    cluster.network("app", subnet=SUBNET)
    run(h1, "web1", "none")
    h1.docker("network", "disconnect", "none", "web1")
    connect = "network", "connect", "--driver-opt"
    assert f"option rate=1kbit: {words}" in refusal(h1, *connect, "rate=1kbit", "app", "web1")
    assert "unknown option 'weft.mtu' of a container" in refusal(h1, *connect, "weft.mtu=1400", "app", "web1")
    assert not [name for name in cluster.links(h1) if "wp" in name]
