"""`weft doctor` on ten hosts over three members of etcd: it names the one way that is broken, and takes its seconds.

How long it takes is printed and not judged, for the machine may be busy; `tests/unit/test_examination.py` holds it to
what bounds it. The hosts have no Docker Engine, which an examination asks for a list of containers and no more.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from lab import Lab
from tests.engine.clinic import Clinic
from tests.engine.conftest import eventually

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

VXLAN = 4789


@pytest.fixture(scope="module")
def clinic() -> Iterator[Clinic]:
    with Lab(hosts=10, name="ten", store="etcd", engines=False, settings={"WEFT_ALLOW_PLAIN_STORE": "on"}) as lab:
        clinic = Clinic(lab)
        eventually(lambda: len(clinic.alive()) == 10, "all hosts are alive", timeout=60)
        yield clinic


def test_ten_hosts_are_examined_within_seconds(clinic: Clinic) -> None:
    h1, h2, *_, h9, _ = clinic.lab.hosts
    clinic.finds(set())
    began = time.monotonic()
    code, shown = clinic.doctor(h1)
    print(f"ten sound hosts: {time.monotonic() - began:.1f} s")
    assert (code, shown.splitlines()[-1]) == (0, "no fault: 10 hosts, 17 checks")

    h2.block_udp(VXLAN, h9)
    h9.block_udp(VXLAN, h2)
    began = time.monotonic()
    found = clinic.finds({("path", "error", ("h2", "h9"))})
    print(f"one broken way, with all that was asked until it was found: {time.monotonic() - began:.1f} s")
    assert found.of("path", "h2", "h9")["cause"] == "UDP port 4789 is dropped on the way between h2 and h9"
    assert f"between {h2.address} and {h9.address}" in found.of("path", "h2", "h9")["evidence"]
