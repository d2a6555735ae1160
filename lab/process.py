"""Commands of the machine, with an error that tells what they said, and waiting with a deadline."""

import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL
from typing import TypeVar

T = TypeVar("T")
Environment = Mapping[str, str] | None

_SHORTEST, _LONGEST = 0.01, 0.2
"""Seconds between two looks."""


class LabError(Exception):
    """Something the lab could not do; the text is for the person in front of it."""


class CommandFailed(LabError):
    def __init__(self, command: str, returncode: int, stdout: str, stderr: str) -> None:
        said = stderr.strip() or stdout.strip() or "it said nothing"
        super().__init__(f"{command}\n  failed ({returncode}): {said}")
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


def run(
    argv: Sequence[str],
    *,
    shown: str | None = None,
    check: bool = True,
    timeout: float = 60,
    env: Environment = None,
) -> str:
    """What the command prints. `shown` is how errors call it, where that differs from argv."""
    command = shown or shlex.join(argv)
    try:
        done = subprocess.run(argv, stdin=DEVNULL, capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        raise LabError(f"{command}\n  did not end within {timeout:g} s") from None
    except OSError as error:
        raise LabError(f"{command}\n  could not be started: {error}") from error
    if check and done.returncode:
        raise CommandFailed(command, done.returncode, done.stdout, done.stderr)
    return done.stdout.rstrip("\n")


def spawn(argv: Sequence[str], *, log: Path, env: Environment = None) -> None:
    """Starts what goes on without us; argv has to fork it away (`setsid --fork`), as no child of ours."""
    with log.open("ab") as output:
        subprocess.run(argv, stdin=DEVNULL, stdout=output, stderr=output, check=True, timeout=10, env=env)


def wait_until(condition: Callable[[], bool], what: str, *, timeout: float = 10) -> None:
    """Looks half of the time at most: most conditions are commands, and what they wait for needs the processor."""
    began = time.monotonic()
    deadline = began + timeout
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise LabError(f"{what}: not within {timeout:g} s")
        time.sleep(min(max(now - began, _SHORTEST), _LONGEST))
        began = time.monotonic()


def all_at_once(action: Callable[[T], None], targets: Iterable[T]) -> None:
    """Waits for all, then raises the first error."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        for done in [pool.submit(action, target) for target in targets]:
            done.result()
