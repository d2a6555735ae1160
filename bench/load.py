"""What etcd had to do, by its own counters."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.request import urlopen

_SAMPLE = re.compile(r"^(?P<name>\w+)(?P<labels>\{.*\})? (?P<value>\S+)$", re.MULTILINE)
_METHOD = re.compile(r'grpc_method="(?P<method>\w+)"')
_ROUND_TRIPS = ("Range", "Txn", "Put", "DeleteRange", "LeaseGrant", "LeaseKeepAlive")


@dataclass(frozen=True)
class Load:
    """Counts since it started, of one member.

    :param round_trips: requests other than watches.
    :param writes: what went through its log, and so to the disk of each member.
    :param watches: open now.
    :param sent: bytes that it sent, as gRPC: the gateway's JSON is longer.
    :param cpu: seconds; 0, as `memory`, if it has no /proc of its own.
    :param memory: megabytes that it has now.
    """

    round_trips: float
    writes: float
    watches: float
    sent: float
    cpu: float
    memory: float

    @classmethod
    def of(cls, endpoint: str) -> Self:
        with urlopen(f"{endpoint}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        plain: dict[str, float] = {}
        methods: dict[str, float] = {}
        for sample in _SAMPLE.finditer(text):
            name, value = sample["name"], float(sample["value"])
            plain[name] = plain.get(name, 0) + value
            if name == "grpc_server_started_total" and (method := _METHOD.search(sample["labels"] or "")):
                methods[method["method"]] = methods.get(method["method"], 0) + value
        return cls(
            round_trips=sum(methods.get(method, 0) for method in _ROUND_TRIPS),
            writes=plain.get("etcd_server_proposals_applied_total", 0),
            watches=plain.get("etcd_debugging_mvcc_watcher_total", 0),
            sent=plain.get("etcd_network_client_grpc_sent_bytes_total", 0),
            cpu=plain.get("process_cpu_seconds_total", 0),
            memory=plain.get("process_resident_memory_bytes", 0) / 1e6,
        )
