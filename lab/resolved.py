"""systemd-resolved, the real one, on a host of the lab: it listens on 127.0.0.53, and /etc/resolv.conf leads there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lab.host import Host
from lab.plan import PROJECT
from lab.process import run, wait_until

STUB = "127.0.0.53"
_CONFIG = "[Resolve]\nDNS={servers}\nFallbackDNS=\nDNSSEC=no\nLLMNR=no\nMulticastDNS=no\n{more}"
# As its package does: its user, and the link.
_START = """
grep -q ^systemd-resolve: /etc/passwd || {
    echo systemd-resolve:x:64053:64053::/:/bin/false >> /etc/passwd
    echo systemd-resolve:x:64053: >> /etc/group
}
mkdir -p /run/systemd
setsid "$0" < /dev/null > /run/resolved.log 2>&1 &
echo $! > /run/resolved.pid
"""


@contextmanager
def resolved(host: Host, servers: Sequence[str], more: str = "") -> Iterator[None]:
    """Have it resolve the host's names while the block runs.

    :param servers: behind it; with none it is not waited for.
    :param more: lines of its configuration.
    """
    program = run([str(PROJECT / "lab/resolved.sh")], timeout=120)
    before = host.run("cat", "/etc/resolv.conf")
    host.write("etc/systemd/resolved.conf", _CONFIG.format(servers=" ".join(servers), more=more))
    host.run("sh", "-ec", _START, program)
    try:
        wait_until(lambda: _listens(host), f"systemd-resolved on {host.name}", timeout=30)
        host.run("ln", "-sf", "../run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf")
        yield
    finally:
        host.run("sh", "-c", 'kill "$(cat /run/resolved.pid)"; rm -rf /run/systemd/resolve', check=False)
        wait_until(lambda: not _listens(host), f"the end of systemd-resolved on {host.name}")
        host.write("etc/resolv.conf", before + "\n")


def _listens(host: Host) -> bool:
    return bool(host.run("ss", "-Hlun", f"src {STUB}"))
