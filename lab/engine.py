"""Which Docker Engine a lab's hosts have: the machine's, that of a release of Debian, or one that somebody built."""

import os
import subprocess
from functools import cache
from pathlib import Path

from lab.plan import PATH, PROJECT
from lab.process import LabError

PROGRAMS = ("dockerd", "docker", "docker-proxy", "containerd", "containerd-shim-runc-v2")
"""What an engine has to itself. runc is the machine's unless a folder has one: newer Debians' need their C library."""
_NO_ENGINE = 77
"""What lab/engine.sh ends with if a release has none, or none that runs here."""


class NoEngine(LabError):
    """That release of Debian does not offer one to this machine; the text says why."""


def search_path(engine: str) -> str:
    """PATH with the programs of an engine before the machine's.

    :param engine: "" for the machine's, a release of Debian such as "trixie", whose engine is fetched when needed,
        or a folder that has `PROGRAMS`; a relative one begins with a dot.
    """
    if not engine:
        return PATH
    return f"{_folder(engine) if '/' in engine else _fetch(engine)}:{PATH}"


def _folder(engine: str) -> Path:
    folder = Path(engine).resolve()
    if missing := [program for program in PROGRAMS if not os.access(folder / program, os.X_OK)]:
        raise LabError(f"{folder} is no Docker Engine: it lacks {', '.join(missing)}")
    return folder


@cache
def _fetch(release: str) -> str:
    done = subprocess.run([PROJECT / "lab/engine.sh", release, *PROGRAMS], stdout=subprocess.PIPE, text=True)
    if done.returncode == _NO_ENGINE:
        raise NoEngine(done.stdout.strip())
    if done.returncode:
        raise LabError(f"the Docker Engine of Debian {release} could not be fetched: see above")
    return done.stdout.strip()
