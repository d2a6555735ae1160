"""The ways between all hosts, measured and shared.

Each host probes a few others now and then, chosen by chance, and those with which something was wrong. What it finds is
one record of the store, written when it says something new, else every few minutes. Nobody watches these records: who
wants them reads them.

A direction that is broken can be told from the other only by both hosts together. So a host that gets no answer asks
the other one, through the store, to probe back at once; and so does a person who wants to know all of it now. Each host
watches only what is asked of itself.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from secrets import token_hex
from time import monotonic

from weft import topology
from weft.cluster import Cluster, Touched
from weft.errors import KernelError, StoreError, WeftError
from weft.identity import LocalHost
from weft.model import readable
from weft.probes.links import RESULTS, ProbeLink, Results, merge, request_key, requests_prefix
from weft.probes.pathmtu import PathMtu
from weft.probes.prober import NETWORKS, Prober
from weft.store import Delete, Put, Snapshot, Store, Watch

log = logging.getLogger(__name__)

_AT_ONCE = 10
"""Hosts that one round of the background probes."""
_SUSPECTS = 20
_ASKED = 3
"""Hosts that one round of the background asks to probe back."""
_MANY = 40
"""Hosts that are probed when somebody wants to know."""
_MEASURE_SECONDS = 5.0
_REFRESH_SECONDS = 300.0
_RETRY_SECONDS = 1.0
_POLL_SECONDS = 0.1
_MOST_LINKS = 200
"""Of one record: it stays below 64 kB."""
_MOST_SOUND = 40
"""Of them, those of which nothing is wrong: so it is about 10 kB as a rule."""
_READ_SECONDS = 2.0
_READ_HOSTS = 50
"""For each so many hosts their records are read again that much later."""


class Probes:
    """Any thread may call.

    :param interval: seconds between rounds of the background; 0: none.
    """

    def __init__(self, store: Store, cluster: Cluster, me: LocalHost, prober: Prober, *, interval: float) -> None:
        self._store = store
        self._cluster = cluster
        self._me = me
        self._prober = prober
        self._interval = interval
        overhead = {kind: topology.overhead(me.host.underlay, encrypted=kind == "encrypted") for kind in NETWORKS}
        self._path_mtu = PathMtu(overhead)
        self._published: tuple[float, object] = (0.0, None)
        self._mentioned: set[str] = set()
        """Hosts in the record that was written last."""
        self._publishing = threading.Lock()
        self._others: tuple[float, list[Results]] = (0.0, [])
        self._heard: set[str] = set()
        self._due = threading.Event()
        self._stopping = threading.Event()
        self._watch: Watch | None = None
        self._threads = [
            threading.Thread(target=self._follow, name="probe-requests", daemon=True),
            threading.Thread(target=self._loop, name="probes", daemon=True),
        ]
        prober.on_heard = self._probe_back

    def start(self) -> None:
        self._prober.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._due.set()
        if self._watch:
            self._watch.close()
        self._prober.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)

    def links(self, *, fresh: bool = False) -> list[ProbeLink]:
        """What is known of the links between all hosts, in both directions; while the store is away, what was known.

        :param fresh: as the store has it now, not a moment ago.
        """
        if fresh:
            self._others = (0.0, self._others[1])
        return self._merged(self._read())

    def known(self) -> list[ProbeLink]:
        """What `links` told last, and what was measured here since then: without a question to the store."""
        return self._merged(self._others[1])

    def _merged(self, records: Iterable[Results]) -> list[ProbeLink]:
        others = (link for results in records if results.host != self._me.id for link in results.links)
        able = {host.id for host in list(self._cluster.hosts.values()) if host.probes}
        links = (link for link in (*self._prober.links(), *others) if link.sender in able and link.receiver in able)
        return merge([*links, *self._unknown()])

    def probe(self, hosts: Collection[str] | None = None, *, deadline: float = 6.0) -> list[ProbeLink]:
        """Measure now; return the links between this host and these.

        :param hosts: ids; by default all other hosts, or if they are many some of them.
        :param deadline: seconds after which it returns with what it has.
        """
        end = monotonic() + deadline
        targets = self._targets(hosts)
        with suppress(StoreError):  # then this host alone measures
            self._ask(targets)
        self._prober.measure(targets, deadline - 1)
        with suppress(StoreError):
            self._await(targets, end)
            self._publish()
        links = self.links(fresh=True)
        return [link for link in links if self._me.id in (link.sender, link.receiver) and _ends(link) & {*targets}]

    def measure(self, seconds: float) -> None:
        """Measure the ways to and from all other hosts in about so many seconds, and share what was found: for when the
        others do so at the same time, unasked."""
        self._prober.measure(self._targets(None), seconds)
        self._publish()

    def follow(self, touched: Touched | None) -> None:
        """A host that is gone is to be in no record: called after each change in the cluster."""
        if touched is None or self._mentioned - self._cluster.hosts.keys():
            self._due.set()

    # What is known

    def _unknown(self) -> Iterable[ProbeLink]:
        """Hosts that do not know probes, and were never measured."""
        for host in list(self._cluster.hosts.values()):
            if not host.probes and host.id != self._me.id:
                yield ProbeLink(self._me.id, host.id, "plain", 0, 0)

    def _read(self) -> list[Results]:
        """The records of all hosts, not older than a moment."""
        read, results = self._others
        if monotonic() - read > _READ_SECONDS * (1 + len(self._cluster.hosts) / _READ_HOSTS):
            with suppress(StoreError):
                results = [found for _, found in readable(Results.read, self._store.list(RESULTS).entries)]
                self._others = monotonic(), results
        return results

    def _publish(self, *, always: bool = True) -> None:
        """Write this host's record, or only if it would say something new."""
        with self._publishing:
            own = sorted(merge(self._prober.links()), key=lambda link: -link.when)
            wrong = {_pair(link) for link in own if link.faulty}
            unanswered = {_pair(link) for link in own if not link.attested}
            telling = [link for link in own if _pair(link) in wrong]
            said = {link.key: _gist(link, witnessed=_pair(link) in unanswered) for link in telling}
            written, before = self._published
            due = said != before or self._mentioned - self._cluster.hosts.keys()
            if not (always or due or monotonic() - written > _REFRESH_SECONDS):
                return
            sound = [link for link in own if _pair(link) not in wrong]
            results = Results(self._me.id, (*telling, *sound[:_MOST_SOUND])[:_MOST_LINKS])
            self._store.transact([], [Put(results.key, results.encode())])
            self._published = monotonic(), said
            self._mentioned = {host for link in results.links for host in _ends(link)}

    # At once

    def _targets(self, hosts: Collection[str] | None) -> list[str]:
        others = [host for host in list(self._cluster.hosts) if host != self._me.id]
        if hosts is not None:
            return [host for host in others if host in hosts]
        return others if len(others) <= _MANY else self._choose(others, _MANY)

    def _ask(self, hosts: Collection[str]) -> None:
        """Have other hosts probe this one."""
        if able := [host for host in hosts if self._answers(host)]:
            self._store.transact([], [Put(request_key(host, self._me.id), token_hex(8)) for host in able])

    def _answers(self, host: str) -> bool:
        """Whether it lives, and knows probes."""
        found = self._cluster.hosts.get(host)
        return bool(found and found.probes and host in self._cluster.alive)

    def _await(self, hosts: Collection[str], end: float) -> None:
        """Until those that live have done it; what the others were asked is withdrawn."""
        keys = {request_key(host, self._me.id) for host in hosts if self._answers(host)}
        while keys and monotonic() < end:
            keys &= self._store.get_many(sorted(keys)).keys()
            self._stopping.wait(_POLL_SECONDS if keys else 0)
        self._store.transact([], [Delete(request_key(host, self._me.id)) for host in hosts])

    def _follow(self) -> None:
        """Do what others ask."""
        while not self._stopping.is_set():
            try:
                self._watch = self._store.watch(requests_prefix(self._me.id))
                for news in self._watch:
                    entries = ((e.key, e.value) for e in news.entries) if isinstance(news, Snapshot) else news.events
                    self._do({key: value for key, value in entries if value})
            except WeftError as error:
                log.debug("no requests for probes: %s", error)  # the agent says that the store is away
            except Exception:
                log.exception("a request for probes met a bug; going on")
            self._stopping.wait(_RETRY_SECONDS)

    def _do(self, asked: Mapping[str, str]) -> None:
        if not asked:
            return
        prefix = requests_prefix(self._me.id)
        try:
            self._prober.measure([key.removeprefix(prefix) for key in asked], _MEASURE_SECONDS)
            self._publish()
        finally:  # the askers wait for it; who has asked again meanwhile is to get a new answer
            present = self._store.list(prefix).entries
            self._store.transact([], [Delete(entry.key) for entry in present if asked.get(entry.key) == entry.value])

    # Now and then

    def _probe_back(self, host: str) -> None:
        """One that did not answer lives: now both sides say what they know of one moment."""
        self._heard.add(host)
        self._due.set()

    def _loop(self) -> None:
        following = random.uniform(0.1, 1.0) * self._interval
        while not self._stopping.is_set():
            self._due.wait(following if self._interval else None)
            if self._stopping.is_set():
                return
            heard = self._heard.copy() if self._due.is_set() else None
            self._due.clear()
            try:
                self._round(heard)
            except (StoreError, KernelError) as error:
                log.debug("the results of probes are not shared: %s", error)
            except Exception:
                log.exception("probing met a bug; going on")
            following = random.uniform(0.8, 1.2) * self._interval

    def _round(self, heard: set[str] | None) -> None:
        before = self._prober.suspects()
        if heard is None:
            others = [host for host in list(self._cluster.hosts) if host != self._me.id and host in self._cluster.alive]
            hosts = set(self._choose(others, _AT_ONCE))
        else:
            hosts = heard
            self._heard -= heard
        self._prober.measure(hosts, _MEASURE_SECONDS)
        if self._interval:
            self._follow_paths()
        fresh = sorted(self._prober.suspects() - before)
        self._ask(fresh[:_ASKED])
        self._publish(always=False)

    def _follow_paths(self) -> None:
        """Have the networks' MTU follow what passes: the others get to know with this host's record."""
        found, before = self._path_mtu.take(self._prober.links(), self._cluster.alive | {self._me.id}), self._me.host
        if found != before.path_mtu:
            self._me.narrow(found)
            if found:
                log.warning("a path to another host carries %d bytes only (weft doctor shows which one)", found)
            else:
                log.warning("the paths to other hosts carry all again")

    def _choose(self, hosts: Collection[str], number: int) -> list[str]:
        """Some of these by chance, and of those with which something was wrong as many as can be."""
        suspects = [host for host in self._prober.suspects() if host in hosts]
        suspects = random.sample(suspects, min(len(suspects), _SUSPECTS))
        rest = [host for host in hosts if host not in suspects]
        return [*suspects, *random.sample(rest, min(len(rest), number))]


def _ends(link: ProbeLink) -> set[str]:
    return {link.sender, link.receiver}


def _pair(link: ProbeLink) -> object:
    """Of this link and its other direction."""
    return frozenset(_ends(link)), link.kind


def _gist(link: ProbeLink, *, witnessed: bool) -> object:
    """What about a link is worth telling others at once.

    :param witnessed: this host got no answer, but has heard the other one: which of its measurements, is what that one
        lacks.
    """
    heard = link.round if witnessed and link.attested else ""
    return _third(link.small), _third(link.full), _third(link.offloaded), link.mtu, bool(link.corrupt), heard


def _third(loss: float | None) -> int | None:
    """None, some, or all of it."""
    return None if loss is None else (loss > 0) + (loss == 1)
