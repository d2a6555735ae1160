"""What the lab's commands say to a person: steps and their time, commands as typed, colour if it is seen."""

import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}


class Terminal:
    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._colour = self._tty and not os.environ.get("NO_COLOR")

    def paint(self, colour: str, text: str) -> str:
        return f"\033[{_CODES[colour]}m{text}\033[0m" if self._colour else text

    def say(self, text: str = "", *, indent: int = 0) -> None:
        print(textwrap.indent(text, " " * indent), flush=True)

    def title(self, text: str) -> None:
        self.say(self.paint("bold", text))

    def typed(self, where: str, command: str) -> None:
        self.say(f"  {self.paint('cyan', where + ' $')} {command}")

    def output(self, text: str) -> None:
        if text:
            self.say("\n".join(self.paint("dim", line) for line in text.splitlines()), indent=7)

    def success(self, text: str) -> None:
        self.say(f"{self.paint('green', '✓')} {text}")

    def failure(self, text: str) -> None:
        self.say(f"{self.paint('red', '✗')} {text}")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """On a terminal the line shows what is going on, and then is replaced by its result."""
        if self._tty:
            print(f"{self.paint('yellow', '…')} {text}", end="", flush=True)
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self._replace_line()
            self.failure(text)
            raise
        self._replace_line()
        self.success(f"{text} {self.paint('dim', f'{time.monotonic() - started:.1f} s')}")

    def _replace_line(self) -> None:
        if self._tty:
            print("\r\033[K", end="")
