"""`FOLDER SIZE HOSTS NETWORKS`: a host comes to a cluster of that population, which is in an etcd of its own.

Prints how long `weft serve` takes to be in sync, its memory, and what the parts of that cost one after the other in a
process of their own, without the agent's threads and without the kernel's echoes.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from bench.inside.population import MTU, UNDERLAY, VNI, Population, myself
from bench.inside.serving import ETCD_BATCH, ETCD_OPTIONS, STATE, Serving, fill
from tests.etcd import Cluster as Etcd
from weft import topology
from weft.cluster import Cluster
from weft.daemon import tune
from weft.dataplane import device_names
from weft.identity import host_id
from weft.kernel import LinuxKernel
from weft.model import TOPOLOGY
from weft.reconcile import Create, plan_rows
from weft.store.etcd import EtcdStore

PORT = 4789
PARTS = ("list", "decode", "plan", "netlink")


def main(folder: Path, population: Population) -> dict[str, float]:
    etcd = Etcd(folder, options=ETCD_OPTIONS)
    try:
        me = host_id(STATE)
        with closing(EtcdStore(etcd.endpoints)) as store:
            fill(store, population, me, batch=ETCD_BATCH)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            parts = process.submit(_take_apart, etcd.endpoints, population, me).result()
        weft = Serving(etcd.endpoints[0].replace("http", "etcd"))
        sync = {"sync_s": weft.await_sync(population), "sync_cpu_s": weft.seconds()}
        return {**parts, **sync, "rest_s": weft.await_rest(population), **weft.memory()}
    finally:
        etcd.kill()


def _take_apart(endpoints: list[str], population: Population, host: str) -> dict[str, float]:
    """Seconds of each part."""
    tune()
    me, kernel = myself(host), LinuxKernel(Path("/run/parts"))
    kernel.open()
    with closing(kernel), closing(EtcdStore(endpoints)) as store:
        for link in topology.network_links(population.network(), local=UNDERLAY, port=PORT + 1, mtu=MTU):
            kernel.perform(Create(link))
        times = [perf_counter()]
        listing = store.list(TOPOLOGY)
        times.append(perf_counter())
        cluster = Cluster()
        cluster.load(listing.entries)
        times.append(perf_counter())
        wanted = topology.network_rows(cluster, VNI, me)
        plan = plan_rows(wanted, kernel.observe_rows(device_names(VNI)))
        times.append(perf_counter())
        kernel.write_rows(plan)
        times.append(perf_counter())
    return dict(zip(PARTS, (after - before for before, after in pairwise(times)), strict=True))


if __name__ == "__main__":
    size, hosts, networks = map(int, sys.argv[2:])
    print(json.dumps(main(Path(sys.argv[1]), Population(size, hosts, networks))))
