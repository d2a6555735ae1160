"""`make demo`: two Docker Engines, one network, a packet seen on its way. All is real but the cable."""

import re
import shlex
import signal
import sys
import time

from lab.host import Host
from lab.lab import Lab
from lab.process import LabError, wait_until
from lab.terminal import Terminal

_ADDRESS = "{{.NetworkSettings.Networks.app.IPAddress}}"
_SUBNET = "{{(index .IPAM.Config 0).Subnet}}"
_OUTER = re.compile(r"IP6? (?P<source>\S+)\.\d+ > (?P<target>\S+)\.(?P<port>\d+): VXLAN.* vni (?P<vni>\d+)")
_INNER = re.compile(r"IP6? (?P<source>\S+) > (?P<target>\S+): (?P<what>ICMP6?,? echo request)")


class Demo:
    def __init__(self, lab: Lab, terminal: Terminal) -> None:
        self.h1, self.h2 = lab.hosts
        self.terminal = terminal

    def play(self) -> str:
        """What was shown, in a few words."""
        self.create_network()
        address = self.run_containers()
        self.ping("web1", address)
        self.show_packet(address)
        speed = self.measure(address)
        return f"one network over two Docker Engines, {speed} across"

    def create_network(self) -> None:
        self.chapter("One network")
        self.docker(self.h1, "network create -d weft --ipam-driver weft app")
        self.terminal.say("  Created once, it is on every host:")
        names = ["network", "ls", "--format", "{{.Name}}"]
        wait_until(lambda: "app" in self.h2.docker(*names).split(), "network app on h2")
        for host in (self.h1, self.h2):
            self.docker(host, f"network inspect --format '{{{{.Driver}}}} {_SUBNET}' app")

    def run_containers(self) -> str:
        self.chapter("A container on each host")
        for host, name in ((self.h1, "web1"), (self.h2, "web2")):
            self.docker(host, f"run -d --name {name} --network app weft-lab", show="^$")
        address = self.docker(self.h1, f"inspect --format '{_ADDRESS}' web1")
        self.docker(self.h2, f"inspect --format '{_ADDRESS}' web2")
        return address

    def ping(self, name: str, address: str) -> None:
        self.chapter("They reach each other, by name")
        output = self.docker(self.h2, f"exec web2 ping -c 3 -W 2 {name}", show="^PING|bytes from|loss")
        if f"({address})" not in output:
            raise LabError(f"{name} should be {address}:\n{output}")
        if " 0% packet loss" not in output:
            raise LabError("web2 on h2 got no answer from web1 on h1 to some of its pings")

    def show_packet(self, address: str) -> None:
        self.chapter("One packet, seen between the hosts")
        self.terminal.typed("h1", "tcpdump -nn -i eth0 udp")
        with self.h1.capture("udp") as lines:
            self.docker(self.h2, f"exec web2 ping -c 1 -W 2 {address}", show="^$")
        for outer, inner in zip(map(_OUTER.search, lines), map(_INNER.search, lines[1:]), strict=False):
            if outer and inner and inner["target"] == address:  # weft's own probes look the same
                self.terminal.say("  What tcpdump saw on h1, in short:")
                self.terminal.output(
                    "{source} > {target}  UDP port {port}, VXLAN, VNI {vni}".format(**outer.groupdict())
                )
                self.terminal.output("  inside: {source} > {target}  {what}".format(**inner.groupdict()))
                return
        raise LabError("the ping was not seen in VXLAN between the hosts; tcpdump saw:\n" + "\n".join(lines))

    def measure(self, address: str) -> str:
        self.chapter("Three seconds at full speed")
        self.docker(self.h1, "exec -d web1 iperf3 --server --one-off")
        wait_until(lambda: ":5201 " in self.h1.docker("exec", "web1", "netstat", "-ltn"), "iperf3 on web1")
        output = self.docker(self.h2, f"exec web2 iperf3 --client {address} --time 3", show="receiver")
        if not (speed := re.search(r"([\d.]+ \wbits/sec)\s+receiver", output)):
            raise LabError(f"iperf3 measured nothing:\n{output}")
        return speed[1].replace("bits/sec", "bit/s")

    def chapter(self, text: str) -> None:
        self.terminal.say()
        self.terminal.title(text)

    def docker(self, host: Host, command: str, *, show: str = "") -> str:
        """Types it, and shows what it answers, or of that the lines in which `show` is found."""
        self.terminal.typed(host.name, f"docker {command}")
        output = host.docker(*shlex.split(command))
        self.terminal.output("\n".join(line for line in output.splitlines() if re.search(show, line)))
        return output


def play(terminal: Terminal) -> str:
    lab = Lab(2, "demo")
    with terminal.step("Two hosts, each with its own Docker Engine and weft; no Swarm, no registry"):
        lab.up()
    try:
        for host in lab.hosts:
            terminal.say(f"{host.name} is {host.address}", indent=2)
        return Demo(lab, terminal).play()
    finally:
        terminal.say()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # somebody impatient would get less than a clean machine
        with terminal.step("Everything is removed"):
            lab.down()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    terminal, started = Terminal(), time.monotonic()
    try:
        summary = play(terminal)
    except LabError as error:
        terminal.failure(f"The demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        terminal.failure("Interrupted.")
        return 130
    terminal.success(f"{terminal.paint('bold', summary)}, in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
