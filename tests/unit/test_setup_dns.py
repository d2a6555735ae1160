"""daemon.json: what is changed, what stays, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from weft import main
from weft.cli import setup_dns
from weft.config import RESOLVER
from weft.errors import ConfigError

HOST = ["192.0.2.53", "192.0.2.54"]


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with two servers, on which no dockerd runs."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("# from DHCP\nsearch lab\n" + "".join(f"nameserver {one}\n" for one in HOST))
    monkeypatch.setattr(
        setup_dns.host_servers, "__defaults__", ((resolv_conf, tmp_path / "systemd", tmp_path / "plugin"),)
    )
    monkeypatch.setattr(setup_dns, "_PROC", tmp_path / "proc")
    return tmp_path


def edited(tmp_path: Path, text: str | None, *, upstream: tuple[str, ...] = ()) -> str:
    path = tmp_path / "daemon.json"
    if text is not None:
        path.write_text(text)
    after = setup_dns.plan(path, RESOLVER, upstream).after
    path.write_text(after)
    again = setup_dns.plan(path, RESOLVER, upstream)
    assert not again.changed, "a second time changes nothing"
    return after


OURS = f'"dns": ["{RESOLVER}", "192.0.2.53", "192.0.2.54"]'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"{{\n  {OURS}\n}}\n"),
        ("", f"{{\n  {OURS}\n}}\n"),
        ("{}", f"{{\n  {OURS}\n}}"),
        ('{"debug":true}', f'{{"debug":true, {OURS}}}'),
        ('{\n\t"debug": true\n}\n', f'{{\n\t"debug": true,\n\t{OURS}\n}}\n'),
        (
            '{\n    "a": {"dns": [1]},\n    "b" : "}{\\"," \n}',
            f'{{\n    "a": {{"dns": [1]}},\n    "b" : "}}{{\\",",\n    {OURS} \n}}',
        ),
        ('{"dns": [], "x": 1}', f'{{{OURS}, "x": 1}}'),
        ('{"dns": ["9.9.9.9"], "x": 1}', f'{{"dns": ["{RESOLVER}", "9.9.9.9"], "x": 1}}'),
        ('{"dns": ["9.9.9.9", "169.254.77.53"]}', f'{{"dns": ["{RESOLVER}", "9.9.9.9"]}}'),
        ('{"dns": ["169.254.77.53"]}', f"{{{OURS}}}"),
        ('{"dns": ["1.1.1.1", "2.2.2.2", "3.3.3.3"]}', f'{{"dns": ["{RESOLVER}", "1.1.1.1", "2.2.2.2", "3.3.3.3"]}}'),
    ],
)
def test_only_dns_is_changed(tmp_path: Path, before: str | None, after: str) -> None:
    assert edited(tmp_path, before) == after
    assert json.loads(after)["dns"][0] == RESOLVER


def test_upstream_servers_may_be_given(tmp_path: Path) -> None:
    after = edited(tmp_path, '{"dns": ["9.9.9.9"]}', upstream=("8.8.8.8",))
    assert json.loads(after)["dns"] == [RESOLVER, "8.8.8.8"]
    with pytest.raises(ConfigError, match="no container can ask ::1"):
        edited(tmp_path, None, upstream=("::1",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "debug": true,\n}', "line 3 column 1"),
        ('{"debug": true', "line 1 column"),
        ("[]", "not a JSON object"),
        ('{"dns": "9.9.9.9"}', "must be a list"),
        ('{"dns": [1]}', "must be a list"),
        ('{"dns": [], "dns": []}', "twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"dns": ["169.254.77.53", "127.0.0.53"]}', "no container can ask 127.0.0.53"),
    ],
)
def test_a_broken_file_is_refused_and_stays(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        setup_dns.plan(path, RESOLVER)
    assert path.read_text() == text


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "daemon.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        setup_dns.plan(tmp_path / "daemon.json", RESOLVER)


def test_the_servers_behind_systemd_resolved(host: Path) -> None:
    (host / "resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    (host / "systemd").write_text("nameserver 2001:db8::53\nnameserver fe80::1%eth0\nnameserver 192.0.2.1\n")
    assert setup_dns.host_servers() == ["192.0.2.1", "2001:db8::53"]
    (host / "systemd").rename(host / "plugin")  # which has the host's /run elsewhere
    assert setup_dns.host_servers() == ["192.0.2.1", "2001:db8::53"]
    (host / "plugin").unlink()
    with pytest.raises(ConfigError, match="--upstream"):
        setup_dns.host_servers()


def test_the_file_keeps_its_mode_and_owner_and_there_is_a_backup(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "daemon.json"
    real.write_text("{}")
    real.chmod(0o640)
    link.symlink_to(real)
    backup = setup_dns.write(setup_dns.plan(link, RESOLVER))
    assert backup
    assert backup.read_text() == "{}"
    assert link.is_symlink()
    assert json.loads(real.read_text())["dns"][0] == RESOLVER
    status = real.stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o640, os.getuid())
    assert {path.name for path in tmp_path.iterdir()} >= {"real.json", backup.name}
    assert not list(tmp_path.glob(".*"))


def run(*words: str) -> int:
    return main.main(["setup", "dns", *words])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docker/daemon.json"
    assert run("--file", str(path), "--dry-run") == 0
    assert f"+  {OURS}" in capsys.readouterr().out
    assert not path.exists()
    assert run("--file", str(path)) == 0
    assert "systemctl restart docker" in " ".join(capsys.readouterr().out.split())
    assert json.loads(path.read_text())["dns"] == [RESOLVER, *HOST]
    assert run("--file", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    path.write_text('{\n  "x": 1,\n}')
    assert run("--file", str(path)) == 1
    assert "line 3 column 1" in capsys.readouterr().err


def test_in_the_managed_plugin_it_says_what_to_write_by_hand(
    host: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_dns, "_PLUGIN_RUN", host)
    assert run() == run("--dry-run") == 1
    said = capsys.readouterr()
    assert f"  {OURS}\n" in said.err
    assert "nothing was changed" in said.err
    assert not said.out
    assert run("--upstream", "9.9.9.9") == 1
    assert f'"dns": ["{RESOLVER}", "9.9.9.9"]' in capsys.readouterr().err


def test_servers_on_dockerds_command_line_are_refused(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = host / "proc/77"
    process.mkdir(parents=True)
    (process / "cmdline").write_bytes(b"/usr/bin/dockerd\0-H\0fd://\0--dns=9.9.9.9\0")
    assert run("--file", str(host / "daemon.json")) == 1
    assert "started with --dns" in capsys.readouterr().err
    (process / "cmdline").write_bytes(b"/usr/bin/dockerd\0-H\0fd://\0--dns-search=lab\0")
    assert run("--file", str(host / "daemon.json")) == 0
