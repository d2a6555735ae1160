"""What can be told while no daemon runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft import config
from weft.cli.offline import Offline
from weft.engine.client import DockerEngine, _state_folders
from weft.model import Endpoint, EndpointNames, Host, Network, Pool

ME, OTHER = Host("a" * 32, "h1", "192.0.2.1"), Host("b" * 32, "h2", "192.0.2.2")
NETWORK = Network(42, "app", (Pool("10.0.0.0/24", "10.0.0.1", {"nas": "10.0.0.9"}),), 0, False, "h1")
ENDPOINT = Endpoint("c" * 64, 42, "02:42:0a:00:00:02", ("10.0.0.2",), OTHER.id)
NAMES = EndpointNames(42, ENDPOINT.id, OTHER.id, "web2", ("web",))


def make(state: Path, *records: Any) -> None:
    state.mkdir(parents=True)
    (state / "host-id").write_text(f"{ME.id}\n")
    entries = [(record.key, record.encode()) for record in records]
    (state / "snapshot.json").write_text(json.dumps({"origin": "etcd://192.0.2.9:2379", "entries": entries}))


def view(tmp_path: Path, docker: str = "off") -> Offline:
    settings = {"WEFT_STATE": f"{tmp_path}/state", "WEFT_RUN": f"{tmp_path}/run", "WEFT_DOCKER": docker}
    return Offline(config.from_environment(settings))


def test_the_snapshot_of_the_service_is_shown_whatever_store_it_was_made_with(tmp_path: Path) -> None:
    make(tmp_path / "state", ME, OTHER, NETWORK, ENDPOINT, NAMES)
    found = view(tmp_path)
    assert [(h["name"], h["alive"], h["endpoints"]) for h in found.hosts()] == [("h1", None, 0), ("h2", None, 1)]
    assert [(n["name"], n["hosts"]) for n in found.networks()] == [("app", ["h2"])]
    assert found.endpoints()[0]["names"] == ["web2", "web"]
    addresses = found.addresses("app")
    assert addresses["pools"] == [{"pool": "10.0.0.0/24", "network": "app", "used": 3, "free": 251}]
    assert [a["holder"] for a in addresses["addresses"]] == ["gateway", f"endpoint {'c' * 12} (web2)", "auxiliary"]
    assert found.addresses("other") == {"pools": [], "addresses": []}
    status = found.status()
    assert (status["host"]["name"], status["store"]["origin"]) == ("h1", "etcd://192.0.2.9:2379")
    assert (status["agent"]["synced"], status["alive"]) == (None, None)
    assert status["problems"]
    assert str(tmp_path / "state/snapshot.json") in found.source
    assert found.plan()[0]["kind"] == "namespace"


def test_a_managed_plugins_snapshot_is_found_through_its_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "Env": ["WEFT_RUN=/host/run/docker/weft", "WEFT_STATE="],
        "Mounts": [
            {"Destination": "/host/api", "Source": "/run"},
            {"Destination": "/var/lib", "Source": f"{tmp_path}/elsewhere"},
        ],
    }
    assert list(_state_folders({"Env": ["A=b"], "Mounts": settings["Mounts"]})) == []  # another plugin
    folders = list(_state_folders(settings))
    assert folders == [tmp_path / "elsewhere/weft"]
    make(folders[0], ME, NETWORK)
    monkeypatch.setattr(DockerEngine, "plugin_states", lambda _: folders)
    found = view(tmp_path, "unix:///nowhere")
    assert [n["name"] for n in found.networks()] == ["app"]
    assert str(folders[0]) in found.source


def test_without_a_snapshot_it_says_so(tmp_path: Path) -> None:
    found = view(tmp_path)
    assert (found.hosts(), found.networks(), found.endpoints()) == ([], [], [])
    assert "there is no snapshot" in found.source
    assert found.status()["host"]["id"] == ""


def test_a_damaged_snapshot_is_none(tmp_path: Path) -> None:
    make(tmp_path / "state", ME)
    (tmp_path / "state/snapshot.json").write_text("[")
    assert view(tmp_path).hosts() == []
