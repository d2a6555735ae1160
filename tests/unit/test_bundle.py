"""What is packed for whoever is to help: all that can be had, and no secret."""

from __future__ import annotations

import argparse
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from weft import config
from weft.cli import bundle
from weft.errors import ConfigError

SECRETS = {
    "password": "Xyzzy-plugh-41",
    "key": "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=",
    "pem": "MHcCAQEEIOdeadbeef",
    "url": "s3same-0pen",
    "token": "SWMTKN-1-abcdef-012345",
    "label": "label-hunter2",
}


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    """Of a host whose secrets lie in its files."""
    state = tmp_path / "state"
    state.mkdir()
    (state / "wireguard.key").write_text(SECRETS["key"])
    (tmp_path / "password").write_text(f"{SECRETS['password']}\n")
    (tmp_path / "tls.key").write_text(f"-----BEGIN PRIVATE KEY-----\n{SECRETS['pem']}\n-----END PRIVATE KEY-----\n")
    (state / "snapshot.json").write_text(f'{{"origin": "", "entries": [["k", "{SECRETS["password"]}"]]}}')
    settings = config.from_environment(
        {
            "WEFT_STATE": str(state),
            "WEFT_RUN": str(tmp_path / "run"),
            "WEFT_SOCKET": str(tmp_path / "weft.sock"),
            "WEFT_STORE": "etcds://192.0.2.1:2379",
            "WEFT_STORE_USER": "weft",
            "WEFT_STORE_PASSWORD_FILE": str(tmp_path / "password"),
            "WEFT_STORE_CERT": str(tmp_path / "tls.crt"),
            "WEFT_STORE_KEY": str(tmp_path / "tls.key"),
            "WEFT_DOCKER": "off",
        }
    )
    return argparse.Namespace(
        settings=settings, output=tmp_path / "out.tar.gz", offline=lambda: SimpleNamespace(state=settings.state)
    )


def content(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        files = ((member.name, archive.extractfile(member)) for member in archive.getmembers())
        return {name: file.read().decode() for name, file in files if file}


def test_planted_secrets_are_nowhere_in_the_file(options: argparse.Namespace, tmp_path: Path) -> None:
    planted = {
        "log/weft.txt": lambda: f"authentication failed for {SECRETS['password']}\nhttp://me:{SECRETS['url']}@proxy/",
        "kernel/host/wireguard.txt": lambda: f"  private key: {SECRETS['key']}\n{(tmp_path / 'tls.key').read_text()}",
        "docker/engine.json": lambda: (
            f'{{"Labels": {{"db_password": "{SECRETS["label"]}"}}, "j": "{SECRETS["token"]}"}}'
        ),
    }
    secrets = bundle._secrets(bundle._secret_files(options, options.settings.socket))
    bundle.pack(options.output, "h1", planted, secrets, lambda _: None)
    packed = "\n".join(content(options.output).values())
    for kind, secret in SECRETS.items():
        assert secret not in packed, kind
    assert "authentication failed for ***" in packed


def test_a_host_on_which_nothing_works_still_gives_a_file(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = bundle._run(options, options.settings.socket)
    assert os.stat(options.output).st_mode & 0o777 == 0o600
    files = {name.partition("/")[2]: text for name, text in content(options.output).items()}
    assert "no weft daemon runs" in files["daemon/events.json"]
    assert "no weft daemon runs" in answer["missing"]["daemon/events.json"]
    assert "this part is missing" in files["kernel/dp/link.txt"]
    assert "docker/engine.json" not in files
    assert '"store": "etcds://192.0.2.1:2379"' in files["settings.json"]
    assert SECRETS["password"] not in "\n".join(files.values())
    assert "password" in files["settings.json"]  # the file's name


def test_nothing_is_overwritten(options: argparse.Namespace) -> None:
    options.output.write_text("mine")
    with pytest.raises(ConfigError, match="--output"):
        bundle._run(options, options.settings.socket)
    assert options.output.read_text() == "mine"
