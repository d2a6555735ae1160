"""What the service manager hears, on a socket as systemd's."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from weft.watchdog import Manager


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(10)
        yield heard


def manager(systemd: socket.socket, patience: float = 0.2) -> Manager:
    return Manager.take({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(int(patience * 1e6))})


def test_ready_is_said_once_all_parts_answer_and_then_signs_of_life(systemd: socket.socket) -> None:
    asked, ready = threading.Event(), threading.Event()

    def answers() -> bool:
        asked.set()
        return ready.is_set()

    weft = manager(systemd)
    weft.watch({"one": answers, "other": lambda: True})
    assert asked.wait(10)
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)
    systemd.settimeout(10)
    ready.set()
    assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
    weft.stopping()
    while systemd.recv(100) != b"STOPPING=1":
        pass


def test_no_sign_of_life_while_a_part_does_not_answer(systemd: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    turns = iter([True, True, False, False])  # ready, alive, stuck twice
    stuck, over = threading.Event(), threading.Event()

    def answers() -> bool:
        turn = next(turns, None)
        if turn is None:
            stuck.set()
            return over.wait(10)
        return turn

    weft = manager(systemd)
    weft.watch({"the agent": answers})
    assert stuck.wait(10)
    weft.stopping()
    assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
    assert "the agent: no answer" in caplog.text
    over.set()


def test_an_abstract_socket_as_of_a_container_manager() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("")  # the kernel chooses an abstract address
        heard.settimeout(10)
        Manager(heard.getsockname().decode().replace("\0", "@", 1)).stopping()
        assert heard.recv(100) == b"STOPPING=1"


def test_its_variables_are_taken_and_without_them_nothing_is_said() -> None:
    variables = {"NOTIFY_SOCKET": "/run/none", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Manager.take(variables).stopping()
    assert variables == {"PATH": "/bin"}
    silent = Manager.take(variables)
    silent.watch({"never asked": lambda: pytest.fail("asked")})
    silent.stopping()
