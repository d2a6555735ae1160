"""Kernel modules. The kernel itself loads what a device needs, if its helper is set up (/proc/sys/kernel/modprobe)."""

from __future__ import annotations

import subprocess
from shutil import which

DEVICE_MODULES = ("bridge", "vxlan", "veth")
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


def load_module(name: str, *parameters: str, path: str = _PATH) -> bool:
    """Whether modprobe has loaded it. False says little: it may be built in, or we may lack CAP_SYS_MODULE.

    :param path: where to look for modprobe.
    """
    program = which("modprobe", path=path)
    return (
        program is not None
        and not subprocess.run([program, "--quiet", name, *parameters], capture_output=True).returncode
    )
