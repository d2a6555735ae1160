"""`make test-kernel`: tests on a kernel such as users have, with its WireGuard, whatever this machine's own can do.

Debian's kernel boots in QEMU by emulation, so that it needs no rights and works inside of virtual machines. The guest
has this machine's files, so there is no image to build and what runs is this checkout; whatever it writes goes to its
memory (`lab/guest/init`). Its second serial line is the terminal of the tests; its first one is its console, where the
last line says how they ended (`lab/guest/main`).

Emulation makes a program ten to twenty times slower. So of the netns tier only those tests are run that are marked
`kernel`: what kernels are known to do differently, and encryption.
"""

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lab.plan import PROJECT
from lab.process import LabError
from lab.terminal import Terminal

FOLDERS = ("tests/kernel", "tests/netns")
_MARK = "mark.kernel"
GUEST = "LAB_GUEST"
"""Set in the guest, to the release of the kernel that it should run."""
_NO_KERNEL = 77
"""What lab/kernel.sh ends with if there is none for this machine."""
LIMIT = 600.0
SILENCE = 180.0
"""Seconds until the guest is taken for hung; of silence, well above what pytest waits until it tells where it hangs."""
_HANGS = 60
_BOOT = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=unstable random.trust_cpu=on "
    "init_on_alloc=0 hardened_usercopy=off apparmor=0 audit=0 norandmaps"
)
"""Without what protects a machine that is attacked, and costs time."""
_NO_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
"""Importing those that nothing here uses takes seconds."""
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
_ENDED = re.compile(r"^weft: the guest's script ended with (\d+)\s*$", re.MULTILINE)
_CPU = "max,-avx,-avx2,-erms,-fsrm,-la57,-smap,-smep,-pku"
"""Without what emulation is slow at: vectors, one instruction that copies byte by byte, checks at each access."""
_MACHINE = f"""
-accel tcg,thread=multi -cpu {_CPU} -smp 1 -m 1024 -nodefaults -no-user-config -display none -no-reboot
-virtfs local,path=/,mount_tag=machine,security_model=none,readonly=on,multidevs=remap
"""


class NoKernel(Exception):
    """There is none for this machine; the text says why."""


def fetch() -> Path:
    """The folder with vmlinuz, initramfs and lib/modules; its name is the kernel's release."""
    done = subprocess.run([PROJECT / "lab/kernel.sh"], stdout=subprocess.PIPE, text=True)
    if done.returncode == _NO_KERNEL:
        raise NoKernel(done.stdout.strip())
    if done.returncode:
        raise LabError("the kernel to test on could not be prepared: see above")
    return Path(done.stdout.strip())


def script(release: str, *, columns: int, colour: bool, environment: Mapping[str, str]) -> str:
    """What the guest runs, for sh."""
    settings = {GUEST: release, "COLUMNS": str(columns), _NO_BYTECODE: "1"}
    settings[_NO_PLUGINS] = "1"
    settings |= {name: environment[name] for name in ("NO_SKIP",) if name in environment}
    options = ["-o", f"faulthandler_timeout={_HANGS}", "--durations=8", f"--color={'yes' if colour else 'no'}"]
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    return f"cd {shlex.quote(str(PROJECT))}\n{exports}{shlex.join(pytest(*options))}\n"


def pytest(*options: str) -> list[str]:
    """The command for the marked tests. It names their files: importing the others takes half a minute."""
    files = sorted(path for folder in FOLDERS for path in PROJECT.joinpath(folder).glob("test_*.py"))
    marked = [str(path.relative_to(PROJECT)) for path in files if _MARK in path.read_text()]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "kernel", *options, *marked]


def compile_tests() -> None:
    """Here, since the guest would need long for it, each time."""
    environment = {**os.environ, _NO_PLUGINS: "1"}
    environment.pop(_NO_BYTECODE, None)
    done = subprocess.run(pytest("--collect-only", "-q"), cwd=PROJECT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"the tests cannot be collected:\n{done.stdout}{done.stderr}")


def qemu(tree: Path, script: Path, console: Path) -> list[str]:
    """The command that is the guest: ends with it, and with us."""
    init = f'"{PROJECT}/lab/guest/main" "{tree}" "{script}"'
    kernel = ["-kernel", str(tree / "vmlinuz"), "-initrd", str(tree / "initramfs"), "-append", f"{_BOOT} -- {init}"]
    lines = ["-serial", f"file:{console}", "-serial", "stdio"]
    return ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *_MACHINE.split(), *lines, *kernel]


def ending(console: str) -> int:
    """The exit code of the guest's script."""
    if found := _ENDED.search(console):
        return int(found[1])
    raise LabError(f"the guest ended before its tests did{_tail(console)}")


def run(argv: Sequence[str], output: IO[bytes], console: Path) -> int:
    """The exit code of the guest's script. What it prints appears at once."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as guest:
        try:
            assert guest.stdout
            problem = _forward(guest.stdout.fileno(), output, limit=LIMIT, silence=SILENCE)
        finally:
            guest.kill()
    said = console.read_text(errors="replace") if console.exists() else ""
    if problem:
        raise LabError(f"the guest was ended: {problem}{_tail(said)}")
    return ending(said)


def _forward(source: int, target: IO[bytes], *, limit: float, silence: float) -> str:
    """Until the source ends; or why it was not waited for."""
    deadline = time.monotonic() + limit
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([source], [], [], min(left, silence))[0]:
            return f"it said nothing for {silence:g} s" if left > silence else f"it took more than {limit:g} s"
        if not (chunk := os.read(source, 65536)):
            return ""
        target.write(chunk)
        target.flush()
    return f"it took more than {limit:g} s"


def _tail(console: str, lines: int = 20) -> str:
    last = "\n".join(f"  {line}" for line in console.splitlines()[-lines:])
    return f"; its console ends with:\n{last}" if last else "; its console is empty"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    terminal = Terminal()
    try:
        tree = fetch()
        compile_tests()
        job, console = tree / "job", tree / "console.log"
        console.unlink(missing_ok=True)
        columns, colour = shutil.get_terminal_size().columns, sys.stdout.isatty()
        job.write_text(script(tree.name, columns=columns, colour=colour, environment=os.environ))
        terminal.say(f"Linux {tree.name} boots in QEMU")
        return run(qemu(tree, job, console), sys.stdout.buffer, console)
    except NoKernel as reason:
        terminal.say(f"SKIPPED: {reason}")
        return 1 if os.environ.get("NO_SKIP") else 0
    except LabError as error:
        terminal.failure(str(error))
        return 1
    except KeyboardInterrupt:
        terminal.failure("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
