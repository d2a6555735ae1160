"""The command line of `weft`, all of it: what docs/cli.md and the shell's completion are made from."""

from __future__ import annotations

import argparse
from typing import Any

from weft import __version__, cli, config
from weft.cli import bundle, setup_dns, setup_host
from weft.config import SETTINGS
from weft.doctor import diagnosis


def parser() -> argparse.ArgumentParser:
    settings = "\n".join(
        f"  {config.variable(name):24} {setting.meaning} [{setting.default}]" for name, setting in SETTINGS.items()
    )
    made = argparse.ArgumentParser(
        prog="weft",
        description="Multi-host networks for plain Docker Engines.",
        epilog=f"settings, from the environment:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"weft {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    cli.add_commands(commands)
    diagnosis.add_command(commands)
    bundle.add_command(commands)
    setup = commands.add_parser("setup", help="prepare this host").add_subparsers(required=True, metavar="WHAT")
    setup_dns.add_command(setup)
    setup_host.add_command(setup)
    _add_completion(commands)
    return made


def completion(shell: str) -> str:
    """The script that lets a shell complete `weft`."""
    import shtab

    return str(shtab.complete(parser(), shell))


def _add_serve(commands: Any) -> None:
    meaning = "serve this host's Docker Engine (in the foreground)"
    commands.add_parser("serve", help=meaning, description=meaning)


def _add_completion(commands: Any) -> None:
    meaning = "print the script that completes weft's commands: source it, or put it where the shell looks"
    made = commands.add_parser("completion", help=meaning, description=meaning)
    made.add_argument("shell", choices=("bash", "zsh"), help="which one")
