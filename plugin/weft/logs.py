"""weft's log: one line per decision, on standard error, as text or as JSON; how much of it is told by module."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from weft.redact import redact

_WEFT = "weft"


def configure(levels: Mapping[str, str], *, structured: bool) -> None:
    """Set up logging of this process.

    :param levels: by module (`agent`, `kernel.rows`), the least level that is shown; by "", that of all others.
    :param structured: each line is a JSON object with `time`, `level`, `logger`, `message` and, maybe, `exception`.
    """
    shown = {f"{_WEFT}.{module}" if module else _WEFT: _number(level) for module, level in levels.items()}
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if structured else _Text())
    handler.addFilter(_Levels(shown))
    # Of other libraries only warnings: pyroute2 writes pages per request.
    logging.basicConfig(level="WARNING", handlers=[handler], force=True)
    for name, level in shown.items():  # the journal wants INFO whatever is shown
        logging.getLogger(name).setLevel(min(level, logging.INFO))


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class _Levels(logging.Filter):
    """Lets pass what is to be shown: the nearest name above a logger's decides."""

    def __init__(self, shown: Mapping[str, int]) -> None:
        super().__init__()
        self._shown = shown

    def filter(self, record: logging.LogRecord) -> bool:
        name = record.name
        while name and name not in self._shown:
            name = name.rpartition(".")[0]
        return record.levelno >= self._shown.get(name, 0)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
