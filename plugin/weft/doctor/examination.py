"""The doctor at work: one host asks, every host answers with a report, the one who asked judges.

The question is a key of the cluster, so that every agent sees it within milliseconds; question and reports go by
themselves after a while. Answering, a host looks at itself and pings the others; meanwhile they probe each other, in a
large cluster just the one who asks. That takes a few seconds, never ten, and some processes: so no host asks by itself,
and whoever shows faults all the time takes `latest` and says `renew`.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_network
from random import sample
from time import monotonic, sleep, time
from typing import Protocol

from weft import __version__
from weft.cluster import Cluster, Touched
from weft.doctor import local, verdict
from weft.doctor.facts import PROBED, Facts, Peering, Report
from weft.doctor.verdict import Examination
from weft.doctor.view import PoolUse, View
from weft.errors import Unreadable, WeftError
from weft.identity import LocalHost
from weft.model import QUESTIONS, REPORTS, Network
from weft.probes.links import ProbeLink
from weft.probes.measurements import Probes
from weft.reconcile import ObservedTunnel
from weft.store import Entry, Store

log = logging.getLogger(__name__)

_LIFE_SECONDS = 30.0
"""Of a question and its answers."""
_ANSWER_SECONDS = 7.0
_PROBE_SECONDS = 6.0
_MEASURE_SECONDS = 4.0
_LONGEST_SECONDS = 8.0
_HEARD_SECONDS = 2.5
"""A host that was late has others probe back; then what it heard is known."""
_POLL_SECONDS = 0.2
_MESH = 16
"""So many hosts measure all ways between them; of more, only those of the one who asks are measured now."""
_MOST_PINGED = 64
_MOST_PEERINGS = 64
_MOST_KEYS = 100
"""Of one request to the store."""
_RENEW_SECONDS, _RENEW_HOSTS = 60.0, 100
"""Without being asked, once in so long; for each so many hosts that much later."""


class Checkup(Protocol):
    """See `checkup.Checkup`."""

    def look(self) -> Facts: ...
    def reached(self, addresses: Iterable[str]) -> dict[str, bool]: ...


class Doctor:
    """One per host; any thread may call.

    :param tunnel: the WireGuard device as it is.
    :param foreign: reads the whole store for what is none of weft's until this moment of `monotonic`: by key, what is
        wrong with it; None if there was too much to read.
    :param port: UDP port of VXLAN.
    """

    def __init__(
        self,
        store: Store,
        cluster: Cluster,
        me: LocalHost,
        checkup: Checkup,
        probes: Probes,
        *,
        tunnel: Callable[[], ObservedTunnel | None],
        foreign: Callable[[float], Mapping[str, str] | None],
        port: int,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._me = me
        self._checkup = checkup
        self._probes = probes
        self._tunnel = tunnel
        self._foreign = foreign
        self._port = port
        self._examining = threading.Lock()
        self._last: tuple[float, Examination] | None = None
        self._answered: set[str] = set()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="doctor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def notice(self, _: Touched | None) -> None:
        """A listener of the agent: there may be a question."""
        if self._cluster.questions:
            self._wake.set()

    def examine(self) -> Examination:
        """Ask all hosts, and judge. Takes some seconds; all who come meanwhile share the next one."""
        came = monotonic()
        with self._examining:
            if self._last and self._last[0] > came:
                return self._last[1]
            began = monotonic()
            found = self._examine()
            self._last = began, found
            return found

    def latest(self) -> Examination | None:
        """The last examination; None before the first."""
        return self._last[1] if self._last else None

    def renew(self) -> None:
        """Examine meanwhile, unless that was done not long ago: for whoever shows faults all the time."""
        age = _RENEW_SECONDS * max(1.0, len(self._cluster.hosts) / _RENEW_HOSTS)
        if (self._last is None or monotonic() - self._last[0] > age) and not self._examining.locked():
            threading.Thread(target=self._renew, name="examination", daemon=True).start()

    def _renew(self) -> None:
        try:
            self.examine()
        except Exception:
            log.exception("an examination met a bug")

    # Asking

    def _examine(self) -> Examination:
        question = secrets.token_hex(8)
        end = monotonic() + _LONGEST_SECONDS
        probing = threading.Thread(target=self._probe, name="doctor-probe", daemon=True)
        probing.start()
        foreign: list[Mapping[str, str] | None] = []
        searching = threading.Thread(target=self._search, args=(foreign, end), name="doctor-search", daemon=True)
        reports: dict[str, Report] = {}
        heard: dict[str, float] = {}
        asked = time()
        with ThreadPoolExecutor(1, thread_name_prefix="doctor-look") as pool:
            looking = pool.submit(self._report, question)
            try:
                self._store.beat(QUESTIONS + question, self._me.id, _LIFE_SECONDS)
                searching.start()
                self._collect(question, reports, heard, min(end, monotonic() + _ANSWER_SECONDS))
                probing.join(max(0.0, end - monotonic()))
                if self._is_mesh:
                    self._await_probes(question, set(reports), end)
                links = self._links()
            except WeftError:  # without the store there is what we see ourselves
                probing.join(max(0.0, end - monotonic()))
                links = self._probes.known()
            if searching.ident:
                searching.join(max(0.0, end - monotonic()))
            mine = looking.result()
        return verdict.examine(
            View(
                me=self._me.id,
                hosts={**self._cluster.hosts, self._me.id: self._me.host},
                alive=set(self._cluster.alive),
                reports={**reports, self._me.id: mine},
                links=links,
                waits={host: (asked, moment) for host, moment in heard.items()},
                pools=[use for network in list(self._cluster.networks.values()) for use in self._uses(network)],
                foreign=foreign[0] if foreign else None,
                port=self._port,
            )
        )

    def _search(self, foreign: list[Mapping[str, str] | None], end: float) -> None:
        """Append what is foreign in the store, if that is known by then."""
        try:
            foreign.append(self._foreign(end))
        except WeftError as error:
            log.debug("what is foreign in the store is not known: %s", error)
        except Exception:
            log.exception("looking for what is foreign in the store met a bug")

    def _collect(self, question: str, reports: dict[str, Report], heard: dict[str, float], end: float) -> None:
        """The answers of the others by id, and when each was there. Waits for those that are alive."""
        missing = {f"{REPORTS}{question}/{host}": host for host in list(self._cluster.hosts) if host != self._me.id}
        while True:
            for entry in self._fetch(sorted(missing)):
                host = missing.pop(entry.key)
                with suppress(Unreadable):
                    reports[host] = Report.decode(entry.value)
                    heard[host] = time()
            if self._cluster.alive.isdisjoint(missing.values()) or monotonic() >= end:
                return
            sleep(_POLL_SECONDS)

    def _fetch(self, keys: Sequence[str]) -> Iterator[Entry]:
        """Those of many keys that are present."""
        for start in range(0, len(keys), _MOST_KEYS):
            yield from self._store.get_many(keys[start : start + _MOST_KEYS]).values()

    def _await_probes(self, question: str, hosts: set[str], end: float) -> None:
        """Until these have probed each other, and shared what they found."""
        keys = {f"{REPORTS}{question}/{host}{PROBED}" for host in hosts}
        while keys and monotonic() < end:
            keys -= self._store.get_many(sorted(keys)).keys()
            sleep(_POLL_SECONDS if keys else 0)
        end = min(end, monotonic() + _HEARD_SECONDS)
        while monotonic() < end and any(
            link.small and not link.attested and link.receiver in {*hosts, self._me.id} for link in self._links()
        ):
            sleep(_POLL_SECONDS)

    @property
    def _is_mesh(self) -> bool:
        return len(self._cluster.hosts) <= _MESH

    def _links(self) -> list[ProbeLink]:
        return self._probes.links(fresh=True)

    def _uses(self, network: Network) -> Iterable[PoolUse]:
        """How full the IPv4 pools are; there is no end to IPv6."""
        endpoints = list(self._cluster.endpoints.get(network.vni, {}).values())
        held = [address for endpoint in endpoints for address in endpoint.addresses]
        ranges = network.published.ranges if network.published else {}
        for pool in network.pools:
            where = ip_network(ranges.get(pool.cidr, pool.cidr), strict=False)
            if where.version == 4:
                used = sum(where.supernet_of(ip_network(one)) for one in held if ":" not in one)  # type: ignore[arg-type]
                spared = len({pool.gateway, *pool.auxiliary.values()} - {""}) + 2
                size = where.num_addresses - (spared if where == ip_network(pool.cidr) else 0)
                yield PoolUse(str(where), network.name or str(network.vni), used, max(size, 1))

    # Answering

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            questions = dict(self._cluster.questions)
            for question in questions.keys() - self._answered:
                try:
                    if questions[question] != self._me.id:
                        self._answer(question)
                except WeftError as error:
                    log.debug("the doctor's question is not answered: %s", error)
                except Exception:
                    log.exception("answering the doctor met a bug")
            self._answered = set(questions)

    def _answer(self, question: str) -> None:
        probing = threading.Thread(target=self._probe, name="doctor-probe", daemon=True)
        if self._is_mesh:
            probing.start()
        key = f"{REPORTS}{question}/{self._me.id}"
        self._store.beat(key, self._report(question).encode(), _LIFE_SECONDS)
        if probing.ident:
            probing.join(_PROBE_SECONDS + 1)
            self._store.beat(key + PROBED, "", _LIFE_SECONDS)

    def _probe(self) -> None:
        """Those of a mesh need not ask each other: the question has all of them measure."""
        try:
            if self._is_mesh:
                self._probes.measure(_MEASURE_SECONDS)
            else:
                self._probes.probe(deadline=_PROBE_SECONDS)
        except WeftError as error:
            log.debug("no probes now: %s", error)
        except Exception:
            log.exception("probing for the doctor met a bug")

    def _report(self, question: str) -> Report:
        facts = self._checkup.look()
        me = self._me.host
        tunnel = self._observe()
        return Report(
            host=me.id,
            name=me.name,
            question=question,
            version=__version__,
            underlay=me.underlay,
            device=facts.device,
            mtu=facts.mtu,
            towards=facts.towards,
            tunnel_key=tunnel.tunnel.key if tunnel else "",
            peerings=_peerings(tunnel) if tunnel else {},
            unpeered=tuple(self._unpeered(tunnel))[:_MOST_PEERINGS] if tunnel else (),
            reached=self._reached(),
            drops=facts.drops,
            findings=tuple(local.of_host(facts)),
            time=time(),
        )

    def _observe(self) -> ObservedTunnel | None:
        with suppress(WeftError):
            return self._tunnel()
        return None

    def _unpeered(self, tunnel: ObservedTunnel) -> Iterable[str]:
        published = {host.wg_key for host in list(self._cluster.hosts.values()) if host.id != self._me.id} - {""}
        return sorted(published - {peer.key for peer in tunnel.tunnel.peers})

    def _reached(self) -> dict[str, bool]:
        others = [host for host in list(self._cluster.hosts.values()) if host.id != self._me.id]
        asked = sample(others, min(len(others), _MOST_PINGED))
        answers = self._checkup.reached({host.underlay for host in asked})
        return {host.id: answers[host.underlay] for host in asked if host.underlay in answers}


def _peerings(tunnel: ObservedTunnel) -> dict[str, Peering]:
    """Of many the worst: those that never answered, then those whose last handshake was long ago."""
    now = time()
    found = {}
    for peer in tunnel.tunnel.peers:
        contact = tunnel.contacts.get(peer.key)
        if contact:
            age = now - contact.handshake if contact.handshake else None
            found[peer.key] = Peering(age, contact.received, contact.sent)
    worst = sorted(found, key=lambda key: (not found[key].unanswered, -(found[key].age or 0.0)))
    return {key: found[key] for key in worst[:_MOST_PEERINGS]}
