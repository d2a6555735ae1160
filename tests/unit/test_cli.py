"""The command's own part: what is asked for, and what is shown, by a daemon that is a few canned answers."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from weft import cli, commandline
from weft.cli import create
from weft.cli import daemon as commands
from weft.cli.ask import NoDaemon
from weft.doctor.verdict import CHECKS
from weft.errors import InvalidRequest, WeftError
from weft.model import Pool


class Daemon(UnixStreamServer):
    """Answers by path, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []
        super().__init__(str(path), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Daemon

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((f"{self.command} {self.path}", json.loads(body) if body else None))
        answer = self.server.answers.get(f"{self.command} {self.path.partition('?')[0]}", {"Err": "no"})
        data = json.dumps(answer).encode()
        self.send_response(409 if "Err" in answer else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "weft.sock"


@pytest.fixture
def daemon(place: Path) -> Iterator[Daemon]:
    with Daemon(place) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def options(*words: str) -> argparse.Namespace:
    return commandline.parser().parse_args(words)


def run(place: Path, *words: str) -> int:
    return cli.run(options(*words), place)


def test_a_network_is_asked_for_as_docker_reads_it() -> None:
    words = (
        "--subnet 10.1.0.0/24 --subnet fd00:1::/64 --gateway 10.1.0.9 --ip-range 10.1.0.128/25 "
        "--aux-address nas=10.1.0.5 --label a=b=c --label bare -o encrypted --opt mtu=1300 "
        "--ipam-opt x=y --internal --attachable"
    )
    asked = create._network(options("network", "create", "app", *words.split()))
    assert asked.pools == (Pool("10.1.0.0/24", "10.1.0.9", {"nas": "10.1.0.5"}), Pool("fd00:1::/64"))
    assert asked.published
    assert asked.published.labels == {"a": "b=c", "bare": ""}
    assert asked.published.options == {"encrypted": "", "mtu": "1300"}
    assert asked.published.ranges == {"10.1.0.0/24": "10.1.0.128/25"}
    assert asked.published.gateways == {"10.1.0.0/24": "10.1.0.9"}
    assert (asked.published.ipv6, asked.published.attachable, asked.internal) == (True, True, True)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--subnet", "10.1.0.5/24"), "host bits"),
        (("--subnet", "ten"), "10.77.0.0/24"),
        (("--gateway", "10.1.0.1"), "none of the subnets"),
        (("--subnet", "10.1.0.0/24", "--gateway", "x"), "gateway 'x' is no address"),
        (("--subnet", "10.1.0.0/24", "--ip-range", "10.2.0.0/25"), "range 10.2.0.0 is in none"),
        (("--subnet", "10.1.0.0/24", "--aux-address", "nas"), "is no address"),
    ],
)
def test_what_does_not_fit_together_is_refused(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        create._network(options("network", "create", "app", *words))


def test_create_waits_for_the_living_hosts(daemon: Daemon, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"name": "app", "vni": 42, "retired": False, "subnets": ["10.1.0.0/24"], "members": ["h1"]}
    daemon.answers = {
        "POST /weft/networks": {"id": "x", "mirrored": True},
        "GET /weft/networks": [network],
        "GET /weft/hosts": [
            {"name": "h1", "alive": True},
            {"name": "h2", "alive": True},
            {"name": "h3", "alive": False},
        ],
    }
    waiting = threading.Thread(target=run, args=(place, "network", "create", "app", "--wait", "60"))
    waiting.start()
    while len(daemon.asked) < 6:
        waiting.join(0.01)
    assert waiting.is_alive()
    network["members"] = ["h1", "h2"]
    waiting.join(30)
    assert "network app (VNI 42), 10.1.0.0/24, is on h1, h2" in capsys.readouterr().out


def test_create_says_which_host_lacks_it(daemon: Daemon, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "_NAME_SECONDS", 0.0)
    network = {"name": "app", "vni": 42, "retired": False, "subnets": [], "members": ["h1"]}
    daemon.answers = {
        "POST /weft/networks": {"id": "x", "mirrored": True},
        "GET /weft/networks": [network],
        "GET /weft/hosts": [{"name": "h2", "alive": True}],
    }
    with pytest.raises(WeftError, match="made on this host, but h2 does not have it"):
        run(place, "network", "create", "app", "--wait", "0.1")
    assert run(place, "network", "create", "app", "--wait", "0", "--json") == 0


def test_a_plan_says_that_nothing_is_to_be_done(
    daemon: Daemon, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["GET /weft/plan"] = []
    assert run(place, "plan") == 0
    daemon.answers["GET /weft/plan"] = [{"kind": "row", "change": f"put [row] {n}"} for n in range(201)]
    run(place, "plan")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["nothing: the kernel is as it should be", "put [row] 0"]
    assert lines[-1] == "and 1 changes more (all of them with --json)"


def test_followed_events_come_one_by_one_whatever_becomes_of_the_daemon(
    daemon: Daemon, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    event = {"id": 7, "when": 0.0, "severity": "info", "source": "agent", "text": "first"}
    daemon.answers["GET /weft/events"] = [event]
    turns = iter(
        [[{**event, "id": 8, "text": "second"}], NoDaemon("none runs"), NoDaemon("none runs"), KeyboardInterrupt()]
    )

    def ask(*_: object) -> Any:
        answer = next(turns)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    first = cli.ask
    monkeypatch.setattr(commands, "ask", lambda *words: first(*words) if "after" not in words[2] else ask())
    monkeypatch.setattr(commands, "_RETRY_SECONDS", 0.0)
    assert run(place, "events", "--follow", "--json") == 0
    said = capsys.readouterr()
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == ["first", "second"]
    assert said.err.count("waiting for it") == 1


def test_no_daemon_is_told_by_the_exit_code(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = options("host", "ls", "--json")
    asked.offline = lambda: argparse.Namespace(source="from the snapshot", hosts=lambda: [{"name": "h1"}])
    assert cli.run(asked, place) == cli.WITHOUT_DAEMON
    said = capsys.readouterr()
    assert json.loads(said.out) == [{"name": "h1"}]
    assert f"no weft daemon runs on this host: none listens at {place} (systemctl start weft" in said.err
    assert "; from the snapshot" in said.err
    with pytest.raises(NoDaemon):
        run(place, "peers")


def checked(number: int, **found: str) -> dict[str, Any]:
    return {"host": f"node-{number}.example", "checks": {**dict.fromkeys(CHECKS, "ok"), **found}}


def test_the_doctor_shows_only_what_is_not_ok_so_that_it_fits_a_terminal(
    daemon: Daemon, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = [checked(number) for number in range(21)]
    daemon.answers["GET /weft/doctor"] = {"hosts": hosts, "findings": []}
    assert run(place, "doctor") == 0
    assert capsys.readouterr().out == "no fault: 21 hosts, 17 checks\n"
    clock = {"check": "clock", "severity": "warning", "hosts": ["node-7.example"], "cause": "early", "evidence": "e"}
    hosts[7] = checked(7, clock="warning", mtu="unknown")
    daemon.answers["GET /weft/doctor"] = {"hosts": hosts[:20], "findings": [{**clock, "command": "date"}]}
    assert run(place, "doctor") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["HOST", "mtu", "clock"], ["node-0.example", "ok", "ok"]]
    assert lines[8].split() == ["node-7.example", "-", "warn"]
    assert lines[21].startswith("ok on all hosts: host, vtep, udp-port, path, checksum, ")
    assert lines[-3:] == ["WARNING clock on node-7.example: early", "  seen:   e", "  repair: date"]
    daemon.answers["GET /weft/doctor"] = {"hosts": hosts, "findings": [{**clock, "command": "date"}]}
    run(place, "doctor")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["HOST", "node-7.example"]
    assert lines[2].endswith("; 20 hosts more, where all is ok")
