"""`SIZE`: starts `weft serve` on a store with so many remote endpoints; prints its memory when all is programmed.

The port of the one local endpoint is none that anybody made; its network is served nevertheless.
"""

import json
import sys
from contextlib import closing

from bench.inside.population import Population
from bench.inside.serving import STATE, Serving, fill
from weft.identity import host_id
from weft.store.sqlite import SqliteStore

STORE = STATE / "weft.db"
_BATCH = 10_000


def main(size: int) -> dict[str, float]:
    population = Population(size)
    with closing(SqliteStore(STORE)) as store:
        fill(store, population, host_id(STATE), batch=_BATCH)
    weft = Serving(f"sqlite://{STORE}")
    return {"rest_s": weft.await_rest(population), **weft.memory()}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
