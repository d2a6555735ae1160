"""While etcd is away, names that were known are answered, and the user's own servers asked as quickly as before."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lab import Lab
from tests.engine.asking import Inside
from tests.engine.conftest import Cluster, eventually

QUICK = 2.0
"""Seconds. Docker waits four for a server that says nothing before it asks the next."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two hosts over three members of etcd."""
    with Lab(hosts=2, name="names", store="etcd") as lab:
        yield Cluster(lab)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_names_are_answered_while_the_store_is_away(cluster: Cluster, inside: Inside, how: str) -> None:
    etcd = cluster.lab.etcd
    away, back = (etcd.kill, etcd.start) if how == "killed" else (etcd.freeze, etcd.thaw)
    cluster.network("app", subnet="10.77.0.0/24")
    address = cluster.run(cluster.h1, "web1", "app")
    cluster.run(cluster.h2, "web2", "app")
    ask = inside(cluster.h2, "web2")
    assert ask("web1", until="answered").answers == [address]
    away()
    try:
        end = time.monotonic() + 15  # longer than the hosts' leases
        while time.monotonic() < end:
            known, foreign = ask("web1"), ask("gateway.lab")
            assert known.answers == [address]
            assert foreign.answers == [cluster.lab.plan.gateway]
            assert max(known.took, foreign.took) < QUICK
            time.sleep(0.2)
        cluster.h1.docker("rename", "web1", "fresh")
    finally:
        back()
    eventually(lambda: ask("fresh").answers == [address], "what happened meanwhile is followed", timeout=60)
    eventually(lambda: not ask("web1").answers, "the old name goes", timeout=10)
