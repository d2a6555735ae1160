"""What is measured, in which unit, and what it should come to."""

from dataclasses import dataclass

from bench.measure import Results, percentile

RAW = "raw"
OVERLAY = "docker_overlay"
BRIDGE = "docker_bridge"
WEFT = "weft"
ENCRYPTED = {"kernel": "weft_encrypted_kernel", "wireguard-go": "weft_encrypted_go"}
"""By what encrypts."""
VARIANTS = {
    RAW: "raw",
    BRIDGE: "bridge",
    OVERLAY: "overlay",
    WEFT: "weft",
    **{variant: f"encrypted ({backend})" for backend, variant in ENCRYPTED.items()},
}


@dataclass(frozen=True)
class Target:
    """A bound on weft's median, on a percentile of all its samples, or on its ratio to another variant.

    :param witness: a metric of the machine itself. If the same percentile of that takes half of the bound already,
        nothing is concluded, neither good nor bad.
    """

    bound: float
    at_least: bool = False
    against: str = ""
    percent: int = 0
    witness: str = ""

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.percent:
            return f"p{self.percent} {sign} {self.bound:g}"
        return f"{sign} {self.bound:.2f}×" if self.against else f"{sign} {self.bound:g}"

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Metric:
    name: str
    part: str
    title: str
    unit: str
    target: Target | None = None

    def value(self, results: Results) -> float | None:
        """What the target speaks of."""
        if self.target and self.target.against:
            ratio = results.ratio(self.name, WEFT, self.target.against)
            return ratio.median if ratio else None
        series = results.get(self.name, WEFT)
        if series and self.target and self.target.percent:
            return percentile(series.samples, self.target.percent)
        return series.spread.median if series else None

    def verdict(self, results: Results) -> bool | None:
        """Whether the target was met; None without a target or a figure."""
        value = self.value(results)
        if self.target is None or value is None or self.is_disturbed(results):
            return None
        return self.target.met_by(value)

    def is_disturbed(self, results: Results) -> bool:
        """Whether the machine was too busy for a verdict, by the target's witness."""
        if self.target is None or not (series := results.get(self.target.witness, WEFT)):
            return False
        return percentile(series.samples, self.target.percent) > self.target.bound / 2


def _ratio(bound: float, *, at_least: bool = False) -> Target:
    return Target(bound, at_least, OVERLAY)


def _converged(store: str) -> Target:
    return Target(50, percent=99, witness=f"transaction_{store}_ms")


PARTS = {
    "a": "Traffic between two hosts",
    "b": "Starting a container",
    "c": "weft's share of a start",
    "d": "Large networks",
    "e": "From an endpoint on one host to the other's kernel",
    "f": "100 simulated hosts",
    "g": "A host comes to 1,000 others",
    "h": "Names: 5,000 questions a second, one core, 10,000 names",
    "i": "Encrypted networks",
    "j": "200 networks on a host, each with a container: the last tenth of them against the first",
}
METRICS = [
    Metric("tcp_1stream_gbps", "a", "TCP, 1 stream", "Gbit/s", _ratio(1.05, at_least=True)),
    Metric("tcp_4stream_gbps", "a", "TCP, 4 streams", "Gbit/s", _ratio(1.05, at_least=True)),
    Metric("udp64_kpps", "a", "UDP, 64 bytes", "kpackets/s", _ratio(1.1, at_least=True)),
    Metric("rtt_us", "a", "UDP round trip", "µs", _ratio(0.95)),
    Metric("run_to_started_s", "b", "docker run -d", "s", _ratio(1.0)),
    Metric("run_to_first_ping_s", "b", "… to the first answered ping", "s", _ratio(1.0)),
    Metric("handlers_ms_per_start", "c", "in weft's handlers", "ms", Target(15)),
    Metric("program_10k_s", "d", "program 10,000 remote endpoints", "s", Target(0.3)),
    Metric("program_100k_s", "d", "program 100,000 remote endpoints", "s", Target(3)),
    Metric("idle_reconcile_100k_s", "d", "compare 100,000, nothing to do", "s", Target(3)),
    Metric("rss_mb_100k", "d", "memory of weft with 100,000", "MB"),
    Metric("converge_sqlite_ms", "e", "with SQLite", "ms", _converged("sqlite")),
    Metric("transaction_sqlite_ms", "e", "… a bare transaction", "ms"),
    Metric("converge_etcd1_ms", "e", "with etcd, 1 member", "ms", _converged("etcd1")),
    Metric("transaction_etcd1_ms", "e", "… a bare transaction", "ms"),
    Metric("converge_etcd3_ms", "e", "with etcd, 3 members", "ms", _converged("etcd3")),
    Metric("transaction_etcd3_ms", "e", "… a bare transaction", "ms"),
    Metric("crowd_each_ms", "f", "a new endpoint is known to each", "ms"),
    Metric("crowd_all_ms", "f", "… to the last of them", "ms"),
    Metric("crowd_real_ms", "f", "… and in the kernel of a real one", "ms"),
    Metric("arrive_100k_s", "g", "in sync with 100,000 endpoints", "s", Target(8)),
    Metric("arrive_100k_mb", "g", "most memory meanwhile", "MB", Target(300)),
    Metric(
        "dns_p99_ms", "h", "an answer takes, 99th percentile", "ms", Target(5, percent=99, witness="dns_echo_p99_ms")
    ),
    Metric("dns_echo_p99_ms", "h", "… by a bare echo in its place", "ms"),
    Metric("dns_lost", "h", "answers lost", "", Target(0)),
    Metric("dns_most_qps", "h", "as many questions as it answers", "1/s", Target(5_000, at_least=True)),
    Metric("name_come_ms", "h", "docker run returned: its name is on the other host", "ms", Target(300, percent=99)),
    Metric("name_gone_ms", "h", "docker kill returned: it is gone there", "ms", Target(300, percent=99)),
    Metric("encrypted_tcp_gbps", "i", "TCP, 1 stream", "Gbit/s"),
    Metric("encrypted_rtt_us", "i", "UDP round trip", "µs"),
    Metric("peers_1000_s", "i", "give WireGuard 1,000 peers", "s", Target(0.5)),
    Metric("many_create_growth", "j", "docker network create", "×"),
    Metric("many_start_growth", "j", "docker run -d", "×"),
    Metric("many_engine_cpu_growth", "j", "CPU of the engine for both", "×"),
    Metric("many_create_calls_growth", "j", "weft's handlers for the network", "×", Target(1.3)),
    Metric("many_start_calls_growth", "j", "weft's handlers for the container", "×", Target(1.3)),
    Metric("many_weft_cpu_growth", "j", "CPU of weft for both", "×", Target(1.3)),
    Metric("many_other_cpu_growth", "j", "CPU of weft on the other host", "×", Target(1.3)),
    Metric("many_idle_percent", "j", "at rest among all of them: CPU of weft", "%", Target(2)),
    Metric("many_idle_engine_percent", "j", "… CPU of the engine", "%"),
    Metric("many_idle_mb", "j", "… memory of weft", "MB"),
]
