"""Over three members of etcd with TLS, client certificates and users, and no further setting: plain and encrypted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab.certificates import Certificates
from tests.engine.conftest import Cluster, eventually, reaches
from tests.engine.three import refusal

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: run lab/setup.sh")

STORE = "etcds"
SUBNET = "10.77.0.0/24"


@pytest.mark.parametrize("options", [(), ("-o", "encrypted")], ids=["plain", "encrypted"])
def test_containers_of_two_hosts_reach_each_other(cluster: Cluster, options: tuple[str, ...]) -> None:
    assert "WEFT_ALLOW_PLAIN_STORE" not in cluster.h1.settings
    cluster.network("app", *options, subnet=SUBNET)
    first, second = cluster.run(cluster.h1, "web1", "app"), cluster.run(cluster.h2, "web2", "app")
    with cluster.h2.capture("udp port 4789") as lines:
        eventually(lambda: reaches(cluster.h1, "web1", second), "ping across")
        assert reaches(cluster.h2, "web2", first)
    assert any(lines) == (not options)


def test_who_is_not_let_in_is_told_why_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("battery staple\n")
    theirs = Certificates(tmp_path / "theirs").ca
    wrong: dict[str, dict[str, str]] = {
        "check WEFT_STORE_CA": {"WEFT_STORE_CA": str(theirs)},
        "check WEFT_STORE_USER and the password": {"WEFT_STORE_PASSWORD_FILE": str(password)},
        "set WEFT_STORE_USER": {"WEFT_STORE_USER": "", "WEFT_STORE_PASSWORD_FILE": ""},
        "WEFT_STORE_CERT": {"WEFT_STORE_CERT": "", "WEFT_STORE_KEY": ""},
    }
    for words, settings in wrong.items():
        said = refusal(cluster.h1, settings)
        assert "it has ended" in said, "it hangs"
        assert "weft cannot start: etcd" in said
        assert words in said
    cluster.h1.start_weft()
    cluster.network("app", subnet=SUBNET)
