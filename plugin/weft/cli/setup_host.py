"""`weft setup host`: what needs more rights than `weft serve` has as a service, done before it starts.

The service cannot load kernel modules, and lives in a mount namespace of its own, in which a mount is nobody else's
and ends with it: the data-plane namespace has to be mounted in the host's. What is there already stays as it is.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console


def add_command(commands: Any) -> None:
    meaning = "load the kernel modules and mount the data-plane namespace, as the service does before each start"
    parser = commands.add_parser("host", help=meaning, description=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, show=_show)


def run(options: argparse.Namespace, socket_path: Path) -> Any:
    from weft.kernel import DEVICE_MODULES, LinuxKernel, load_module

    for module in DEVICE_MODULES:
        load_module(module)
    with closing(LinuxKernel(options.settings.run)) as kernel:
        kernel.open()
        kernel.check()
    return {"namespace": str(options.settings.run / "dp")}


def _show(answer: Any, console: Console) -> None:
    console.print(f"this host is ready; its data-plane namespace is {answer['namespace']}", highlight=False)
