"""The log's form and levels, and that neither it nor the journal says a secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from weft import config, logs
from weft.errors import ConfigError
from weft.journal import Journal

AGENT = logging.getLogger("weft.agent")
ROWS = logging.getLogger("weft.kernel.rows")
OTHER = logging.getLogger("urllib3.pool")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Loggers are global: as they were, afterwards."""
    root, names = logging.getLogger(), ("weft", "weft.agent", "weft.kernel")
    before = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:], levels = before[0], before[2]
    root.setLevel(before[1])
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_the_nearest_module_decides_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({"": "warning", "agent": "debug", "kernel": "error"}, structured=False)
    AGENT.debug("one")
    ROWS.warning("two")
    ROWS.error("three")
    logging.getLogger("weft.driver").info("four")
    OTHER.info("five")
    OTHER.warning("six")
    assert capsys.readouterr().err.splitlines() == [
        "DEBUG weft.agent: one",
        "ERROR weft.kernel.rows: three",
        "WARNING urllib3.pool: six",
    ]


def test_each_line_is_an_object_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({"": "info"}, structured=True)
    AGENT.warning("%d rows\nin two lines", 3)
    try:
        raise ValueError("no")
    except ValueError:
        AGENT.exception("a bug")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("warning", "weft.agent", "3 rows\nin two lines")
    assert first["time"].endswith("+00:00")
    assert "exception" not in first
    assert second["exception"].endswith("ValueError: no")


@pytest.mark.parametrize("structured", [False, True])
def test_no_secret_is_logged(capsys: pytest.CaptureFixture[str], structured: bool) -> None:
    logs.configure({"": "debug"}, structured=structured)
    try:
        raise ValueError("password=hunter2")
    except ValueError:
        AGENT.exception("etcd://root:%s@etcd1 is away", "hunter2")
    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert "etcd1" in said


def test_the_journal_has_what_the_log_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure({"": "error"}, structured=False)
    journal = Journal(clock=lambda: 100.0)
    logging.getLogger("weft").addHandler(journal)
    try:
        AGENT.info("decided at %s", "etcd://root:hunter2@etcd1")
        AGENT.debug("motion")
    finally:
        logging.getLogger("weft").removeHandler(journal)
    [event] = journal.after()
    assert (event.source, event.severity, event.when) == ("agent", "info", 100.0)
    assert event.text == "decided at etcd://***@etcd1"
    assert capsys.readouterr().err == ""


def test_levels_are_read_from_the_setting() -> None:
    settings = config.from_environment({"WEFT_LOG": "warning,agent=debug,kernel.rows=info"})
    assert settings.log == {"": "warning", "agent": "debug", "kernel.rows": "info"}
    assert config.from_environment({"WEFT_LOG": "agent=debug"}).log == {"": "info", "agent": "debug"}
    for wrong, why in {
        "loud": "must be debug",
        "info,agnet=debug": "agnet is not a module",
        "agent=": "must be",
    }.items():
        with pytest.raises(ConfigError, match=why):
            config.from_environment({"WEFT_LOG": wrong})
