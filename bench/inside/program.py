"""`SIZE TIMES`: programs a network of so many remote endpoints from empty, then compares it, which finds nothing to do.

Both are what the agent does in a resync: compute the wanted rows, dump the kernel's, plan, write.
"""

import json
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from bench.inside.population import MTU, UNDERLAY, VNI, Population, myself
from weft import topology
from weft.cluster import Cluster
from weft.daemon import tune
from weft.dataplane import bridge_name, vxlan_name
from weft.kernel import LinuxKernel
from weft.reconcile import Create, Remove, plan_rows

HOST_ID = "e" * 32
PORT = 4789
PARTS = ("wanted", "observe", "plan", "write")
DEVICES = (bridge_name(VNI), vxlan_name(VNI))


def main(size: int, times: int) -> list[dict[str, dict[str, float]]]:
    tune()
    population = Population(size)
    cluster = Cluster()
    cluster.apply((put.key, put.value) for put in population.records(HOST_ID))
    kernel = LinuxKernel(Path("/run/weft"))
    kernel.open()
    with closing(kernel):
        return [_once(kernel, cluster, population) for _ in range(times)]


def _once(kernel: LinuxKernel, cluster: Cluster, population: Population) -> dict[str, dict[str, float]]:
    for link in topology.network_links(population.network(), local=UNDERLAY, port=PORT, mtu=MTU):
        kernel.perform(Create(link))
    rows = population.row_count
    measured = {"program": _resync(kernel, cluster, expected=rows), "idle": _resync(kernel, cluster, expected=0)}
    for name in reversed(DEVICES):
        kernel.perform(Remove(name, "measured"))
    return measured


def _resync(kernel: LinuxKernel, cluster: Cluster, *, expected: int) -> dict[str, float]:
    """Seconds of each part; `expected` is the number of rows that must turn out to be wrong."""
    times = [perf_counter()]
    wanted = topology.network_rows(cluster, VNI, myself(HOST_ID))
    times.append(perf_counter())
    observed = kernel.observe_rows(DEVICES)
    times.append(perf_counter())
    plan = plan_rows(wanted, observed)
    times.append(perf_counter())
    if plan:
        kernel.write_rows(plan)
    times.append(perf_counter())
    if len(plan) != expected:
        raise SystemExit(f"the plan has {len(plan)} rows and should have {expected}: {str(plan)[:300]}")
    parts = dict(zip(PARTS, (after - before for before, after in pairwise(times)), strict=True))
    return {**parts, "total": times[-1] - times[0], "rows": len(plan)}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
