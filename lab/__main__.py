"""`python -m lab up | down | status | run HOST -- command`: a lab to try things in by hand."""

import argparse
import os
import signal
import sys

from lab.daemon import Daemon
from lab.host import Host
from lab.lab import Lab
from lab.plan import RUNTIME, STORES, Plan
from lab.process import LabError
from lab.terminal import Terminal


def up(args: argparse.Namespace, terminal: Terminal) -> None:
    lab = Lab(args.hosts, args.name, weft=not args.no_weft, engine=args.engine, store=args.store)
    weft = "without weft" if args.no_weft else "with weft"
    with terminal.step(f"{args.hosts} hosts, each with a Docker Engine of its own, {weft}"):
        lab.up()
    terminal.say("\nTalk to one, or have one terminal for each:\n")
    for host in lab.hosts:
        terminal.say(f"  export DOCKER_HOST={host.docker_host}  {terminal.paint('dim', '# ' + host.address)}")
    terminal.say("\nThen, for example:\n")
    if not args.no_weft:
        terminal.say("  docker network create -d weft --ipam-driver weft app")
    terminal.say(f"  docker run --rm {'' if args.no_weft else '--network app '}weft-lab ip addr")
    python = os.path.relpath(sys.executable)
    option = "" if args.name == "lab" else f" --name {args.name}"
    inside = f"{python} -m lab run{option} h1 --"
    terminal.say()
    if not args.no_weft:
        terminal.say(f"What weft says: {inside} weft status")
    terminal.say(f"Inside a host:  {inside} bash")
    terminal.say(f"Stop it all:    {python} -m lab down{option}")


def down(args: argparse.Namespace, terminal: Terminal) -> None:
    with terminal.step(f"lab {args.name} is gone"):
        Lab.load(args.name).down()


def status(args: argparse.Namespace, terminal: Terminal) -> None:
    names = sorted(plan.parent.name for plan in RUNTIME.glob("*/plan.json"))
    if not names:
        terminal.say("no lab is up")
    for name in names:
        terminal.title(name)
        for host in Lab.load(name).hosts:
            terminal.say(f"  {host.name}  {host.address}  {_health(host, terminal)}  {host.docker_host}")


def _health(host: Host, terminal: Terminal) -> str:
    def state(daemon: Daemon) -> str:
        return terminal.paint("green", "runs") if daemon.pid else terminal.paint("red", "is down")

    return ", ".join(f"{daemon.name} {state(daemon)}" for daemon in host.daemons)


def run(args: argparse.Namespace, terminal: Terminal) -> None:
    host = Lab.load(args.name).host(args.host)
    argv = host.enter(args.command or ["bash"])
    # A DOCKER_HOST of another host would be reached from here as well.
    caller = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    os.execvpe(argv[0], argv, {**caller, **host.shell_environment()})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, action: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(action=action)
        sub.add_argument("--name", default="lab", help="of the lab: several can be up (default: %(default)s)")
        return sub

    start = command("up", up, "start the hosts, after cleaning up what is left of a lab of that name")
    start.add_argument("-n", "--hosts", type=int, default=2, help="how many (default: %(default)s)")
    start.add_argument("--no-weft", action="store_true", help="Docker Engines only")
    start.add_argument("--engine", default=Plan.engine, help="of a release of Debian, or a folder with one's programs")
    start.add_argument("--store", choices=STORES, default=STORES[0], help="of weft (default: %(default)s)")
    command("down", down, "end a lab and remove all it had")
    command("status", status, "what is up")
    inside = command("run", run, "run a command, or a shell, on a host")
    inside.add_argument("host")
    inside.add_argument("command", nargs="*", help="after --")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a lab half-way up is cleaned up
    args, terminal = _arguments(), Terminal()
    try:
        args.action(args, terminal)
    except (LabError, PermissionError) as error:
        terminal.failure(str(error))
        return 1
    except KeyboardInterrupt:
        terminal.failure("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
