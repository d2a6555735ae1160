"""The machine that is measured: what it is, and whether it has anything else to do."""

import os
import platform
from pathlib import Path
from time import sleep

from lab.plan import PATH
from lab.process import run


def describe() -> str:
    return f"{_processor()}, {os.cpu_count()} cores, {_kernel()}, Docker Engine {_engine()}, {_python()}"


def busy(seconds: float = 1.0) -> float:
    """Share of its processors' time that is used, or that a hypervisor gives to others, just now."""
    before = _idle()
    sleep(seconds)
    idle, total = (after - was for was, after in zip(before, _idle(), strict=True))
    return 1 - idle / total


def _idle() -> tuple[int, int]:
    """Ticks in which nothing ran, and all ticks."""
    ticks = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _kernel() -> str:
    """Without what a distributor has appended to the version."""
    return f"{platform.system()} {platform.release().partition('-')[0]}"


def _engine() -> str:
    """That of the lab, without what a distributor has appended."""
    said = run(["dockerd", "--version"], env={"PATH": PATH})
    return said.removeprefix("Docker version ").partition(",")[0].partition("+")[0]


def _python() -> str:
    return f"Python {platform.python_version()}"
