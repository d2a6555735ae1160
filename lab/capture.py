"""tcpdump around a block of code."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from lab.process import LabError

# tcpdump is in another PID namespace and a signal to nsenter would not reach it, so it says who it is.
_SAY_PID = 'echo $$ >&2; exec "$@"'
_TCPDUMP = ["tcpdump", "-nn", "-l", "--immediate-mode", "-Z", "root"]


@contextmanager
def tcpdump(
    options: Sequence[str],
    *,
    enter: Callable[[Sequence[str]], list[str]],
    stop: Callable[[str], object],
) -> Iterator[list[str]]:
    """Yields a list that is filled with tcpdump's lines at the end. `stop` interrupts a pid inside."""
    lines: list[str] = []
    argv = enter(["sh", "-c", _SAY_PID, "sh", *_TCPDUMP, *options])
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(argv, stdout=output, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr
        pid = process.stderr.readline().strip()
        _await_listening(process.stderr)
        try:
            yield lines
        finally:
            time.sleep(0.1)  # interrupted, tcpdump drops what it has not read yet; nothing tells when it has
            stop(pid)
            process.communicate(timeout=10)
            output.seek(0)
            lines.extend(output.read().splitlines())


def _await_listening(stderr: IO[str]) -> None:
    said = []
    for line in stderr:
        if "listening on" in line:
            return
        said.append(line)
    raise LabError(f"tcpdump: {''.join(said)}")
