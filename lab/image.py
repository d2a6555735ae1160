"""A small image made of the machine's own programs, so that no registry is needed: busybox and iperf3."""

import io
import re
import shutil
import tarfile
from pathlib import Path

from lab.process import LabError, run

NAME = "weft-lab:latest"
# Process 1 ignores SIGTERM unless told otherwise: without the trap `docker stop` would take ten seconds.
COMMAND = ["sh", "-c", "trap exit TERM; while :; do sleep 3600 & wait; done"]
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}


def build(path: Path) -> None:
    """Writes the image's root folder as a tar file for `docker import`."""
    busybox, iperf3 = (_program(name) for name in ("busybox", "iperf3"))
    with tarfile.open(path, "w") as tar:
        for folder in ("bin", "etc", "root", "tmp"):
            _add(tar, _entry(folder, tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755))
        for name, text in _FILES.items():
            _add(tar, _entry(name), text.encode())
        for program in (busybox, iperf3):
            _add(tar, _entry(f"bin/{program.name}", mode=0o755), program.read_bytes())
        for library in sorted({*_libraries(busybox), *_libraries(iperf3)}):
            _add(tar, _entry(str(library)[1:], mode=0o755), library.read_bytes())
        for applet in run([str(busybox), "--list"]).split():
            if applet != "busybox":
                _add(tar, _entry(f"bin/{applet}", tarfile.SYMTYPE, link="busybox"))


def _program(name: str) -> Path:
    found = shutil.which(name)
    if not found:
        raise LabError(f"{name} is missing: lab/setup.sh installs what the lab needs")
    return Path(found)


def _libraries(program: Path) -> list[Path]:
    """Where the dynamic linker finds them; none for a static program, which ldd calls a failure."""
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", run(["ldd", str(program)], check=False))]


def _entry(name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname = kind, mode, link
    return entry


def _add(tar: tarfile.TarFile, entry: tarfile.TarInfo, content: bytes = b"") -> None:
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
