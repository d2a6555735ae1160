"""Whether a mount made by this process is there for the host too, and outlives us.

In the host's mount namespace it is. In one of our own (a container, a unit with ProtectSystem=) it is only if mounts
propagate to the host's, that is if the one around it is *shared* with the host's and no *slave* of it
(mount_namespaces(7)): systemd makes a unit's mounts slaves and then shared again, with nobody.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def outlives_us(path: Path) -> bool:
    """Whether a mount at `path` would."""
    return is_shared(path, Path("/proc/self/mountinfo").read_text()) or _in_hosts_namespace()


def is_shared(path: Path, mountinfo: str) -> bool:
    """Whether the mount that holds `path` is, with no master, by a text such as /proc/self/mountinfo (proc(5))."""
    found, shared = -1, False
    for line in mountinfo.splitlines():
        fields = line.split()
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= found:  # a later one covers an earlier one
            options = fields[6 : fields.index("-")]
            found, shared = len(point.parts), [option.split(":")[0] for option in options] == ["shared"]
    return shared


def _in_hosts_namespace() -> bool:
    """Process 1 of the host is neither weft nor its parent; that of a container may be.

    A container with an init of its own (`docker run --init`) looks like a host: a system container, which is one, has
    that too.
    """
    try:
        same = os.stat("/proc/1/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return False
    return same and 1 not in (os.getpid(), os.getppid())
