"""HTTP to etcd's JSON gateway (`/v3/…`): which member to ask, logging in, and what its answers mean.

A call goes to the member that answered last and,
while that cannot serve, to the others in turn. Every request carries `hasleader`: a member that lost its cluster then
says so at once instead of hanging. A token is fetched when etcd first asks for one, and again when it does not know it
any more, as after a restart; the password is read from its file at that moment and not kept.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from time import monotonic, sleep
from typing import Any, TypeVar, overload

import msgspec
import requests
from urllib3 import Timeout

from weft.errors import StoreError
from weft.store.connections import Access, Connections

PATIENCE_SECONDS = 4.7
"""Long enough for an election whose first vote was split."""
_ANSWER_SECONDS = 1.5
_LEAST_SECONDS = 0.2
_PAUSE_SECONDS = 0.1
_SILENCE_SECONDS = 60.0
"""After so long, a silent stream is opened anew, in case something on the way has forgotten it."""

_FINAL = {3, 5, 7, 9, 11, 12, 16}
"""gRPC codes that every member would give. The others (unavailable, too late, overloaded, …) may pass."""
_LOG_IN = ("user name is empty", "invalid auth token", "is old")
"""What etcd says to a request with no token, with one it does not know, and with one from before users changed."""
_HUNG_UP = "closed connection without response"
"""What some versions do instead (etcd-io/etcd issues 15256 and 20332)."""
_NO_USERS = "authentication is not enabled"

_HINTS = {
    "^http:.*(without response|reset by peer)|to an HTTPS server": (
        "if etcd serves TLS there, write etcds:// in WEFT_STORE; if it has users, set WEFT_STORE_USER and "
        "WEFT_STORE_PASSWORD_FILE"
    ),
    "certificate verify failed": "check WEFT_STORE_CA, and that etcd's certificate names this endpoint",
    r"could not find|\[X509|PEM": "correct WEFT_STORE_CA, WEFT_STORE_CERT and WEFT_STORE_KEY",
    "violation of protocol|certificate|unknown ca|reset by peer|without response": (
        "etcd may want a client certificate that its CA signed (WEFT_STORE_CERT, WEFT_STORE_KEY), or serve no TLS "
        "there: then write etcd:// in WEFT_STORE"
    ),
    "wrong version number": "etcd serves no TLS there: write etcd:// in WEFT_STORE",
    "user name is empty": "etcd wants a user: set WEFT_STORE_USER and WEFT_STORE_PASSWORD_FILE",
    "authentication failed": "check WEFT_STORE_USER and the password in WEFT_STORE_PASSWORD_FILE",
    "permission denied": "type etcdctl role grant-permission ROLE readwrite --prefix=true {prefix}",
    "CommonName": "the gateway takes no client certificate with a CN while etcd has users: issue one without",
    "connection closed|transport is closing": "etcd's own certificate must be valid for clientAuth as well",
    "space exceeded": "compact and defragment etcd, then type etcdctl alarm disarm",
    "too many operations": "ask for less at once, or raise etcd's --max-txn-ops",
    "HTTP 404": "no JSON gateway is there: check WEFT_STORE and etcd's --enable-grpc-gateway",
    "refuses": "see etcd's log",
    "": "check that etcd runs and has a quorum, the network to it, and WEFT_STORE",
}
"""What to do, by the first of these patterns that is found in an endpoint and the message."""

Json = dict[str, Any]

T = TypeVar("T")


class Away(Exception):
    """This member cannot serve now; another may."""


class Silence(Away):
    """A stream said nothing for long. That is no fault, but only a new one can tell."""


class Refused(StoreError):
    """etcd's answer is no, whichever member is asked."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Gateway:
    """
    :param endpoints: URLs of members, in the order in which they are asked until one answers.
    :param prefix: what every key begins with.
    :param patience: seconds after which a call fails, whatever the members do: refuse, hang, or have no leader.
    :param connections: those that it is to share with others.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        access: Access,
        prefix: str,
        *,
        patience: float = PATIENCE_SECONDS,
        connections: Connections | None = None,
    ) -> None:
        self.endpoint = endpoints[0]
        """The member to ask first."""
        self._endpoints = tuple(endpoints)
        self._access = access
        self._prefix = prefix
        self._patience = patience
        self._token = ""
        self._token_lock = threading.Lock()
        self._gave_up = False
        self._connections = connections or Connections(access)

    @property
    def places(self) -> dict[str, str]:
        """The endpoints, and how people write them."""
        return {endpoint: _place(endpoint) for endpoint in self._endpoints}

    @overload
    def call(self, path: str, body: Json) -> Json: ...
    @overload
    def call(self, path: str, body: Json, kind: type[T]) -> T: ...
    def call(self, path: str, body: Json, kind: Any = Json) -> Any:
        """The first answer that a member gives. The request may reach several: it must bear being repeated.

        While etcd is away, only the first call waits for it to come back; the next ones ask every member once.

        :param kind: what msgspec shall make of the answer; for a large one that is quicker than dicts.
        """
        problems: dict[str, str] = {}
        for endpoint, seconds in self._turns():
            try:
                answer = self.ask(endpoint, path, body, seconds, kind)
            except Away as error:
                problems[endpoint] = str(error)
                self.avoid(endpoint)
            else:
                self._gave_up = False
                return answer
        self._gave_up = True
        text = ", ".join(f"{_place(endpoint)} ({problem})" for endpoint, problem in problems.items())
        raise StoreError(self._explained(f"etcd cannot be used: {text}"))

    def avoid(self, endpoint: str) -> None:
        """Let the next call begin with another member than this."""
        if endpoint == self.endpoint:
            self.endpoint = self._endpoints[(self._endpoints.index(endpoint) + 1) % len(self._endpoints)]

    def ask(self, endpoint: str, path: str, body: Json, seconds: float = _ANSWER_SECONDS, kind: Any = Json) -> Any:
        """This member's answer; `Away` if it has none."""
        token = self._token
        try:
            return self._post(endpoint, path, body, token, seconds, kind)
        except Refused as refusal:
            if not (self._access.user and any(text in str(refusal) for text in _LOG_IN)):
                raise
        except Away as error:
            if not (self._access.user and _HUNG_UP in str(error)):
                raise
        self._log_in(endpoint, token, seconds)
        return self._post(endpoint, path, body, self._token, seconds, kind)

    @contextmanager
    def stream(self, endpoint: str, path: str, body: Json) -> Iterator[requests.Response]:
        """An answer that goes on. While it is read, too, failures are `Away`, or `Silence`."""
        url, data, headers = self._request(endpoint, path, body, self._token)
        timeout = (_ANSWER_SECONDS, _SILENCE_SECONDS)
        with (
            _failures(),
            self._connections.open() as session,
            session.post(url, data, headers=headers, timeout=timeout, stream=True) as response,
        ):
            self._check(endpoint, response)
            with _failures(timeout=Silence):
                yield response

    def close(self) -> None:
        self._connections.close()

    def _turns(self) -> Iterator[tuple[str, float]]:
        """Whom to ask next, and for how many seconds: an equal share of what is left for each member of a round."""
        deadline = monotonic() + self._patience
        start = self._endpoints.index(self.endpoint)
        turns = self._endpoints[start:] + self._endpoints[:start]
        for number, endpoint in enumerate(cycle(turns)):
            again, place = divmod(number, len(turns))
            if again and (self._gave_up or deadline - monotonic() < _PAUSE_SECONDS + _LEAST_SECONDS):
                return
            if again and not place:
                sleep(_PAUSE_SECONDS)
            share = (deadline - monotonic()) / (len(turns) - place)
            yield endpoint, min(_ANSWER_SECONDS, max(share, _LEAST_SECONDS))

    def _post(self, endpoint: str, path: str, body: Json, token: str, seconds: float, kind: Any = Json) -> Any:
        url, data, headers = self._request(endpoint, path, body, token)
        limit: Any = Timeout(total=seconds)  # a plain number would be granted to each step
        with _failures(), self._connections.one() as session:
            response = session.post(url, data, headers=headers, timeout=limit)
            self._check(endpoint, response)
            answer = msgspec.json.decode(response.content, type=kind, strict=False)
        if kind is Json and "error" in answer:  # of a stream, which had begun well
            raise Away(str(answer["error"].get("message")))
        return answer

    def _request(self, endpoint: str, path: str, body: Json, token: str) -> tuple[str, bytes, dict[str, str]]:
        headers = {"Grpc-Metadata-hasleader": "true"} | ({"Authorization": token} if token else {})
        return f"{endpoint}/v3/{path}", msgspec.json.encode(body), headers

    def _check(self, endpoint: str, response: requests.Response) -> None:
        if response.status_code == requests.codes.ok:
            return
        try:
            error = response.json()
            code, text = int(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            code, text = 0, f"HTTP {response.status_code} {response.text.strip().partition(chr(10))[0][:200]}"
        if code not in _FINAL:
            raise Away(text)
        raise Refused(code, self._explained(f"etcd at {_place(endpoint)} refuses: {text}"))

    def _log_in(self, endpoint: str, stale: str, seconds: float) -> None:
        if not self._token_lock.acquire(timeout=seconds):
            raise Away("no answer")
        try:
            if self._token == stale:  # else another thread was quicker
                body = {"name": self._access.user, "password": self._password()}
                self._token = str(self._post(endpoint, "auth/authenticate", body, "", seconds)["token"])
        except Refused as refusal:
            if _NO_USERS in str(refusal):
                raise Away(_HUNG_UP) from refusal
            raise
        finally:
            self._token_lock.release()

    def _password(self) -> str:
        try:
            return self._access.password_file.read_text().rstrip("\n") if self._access.password_file else ""
        except (OSError, ValueError) as error:
            raise StoreError(f"etcd's password cannot be read: {error}; correct WEFT_STORE_PASSWORD_FILE") from error

    def _explained(self, text: str) -> str:
        symptoms = f"{self._endpoints[0]}: {text}"
        hint = next(hint for pattern, hint in _HINTS.items() if re.search(pattern, symptoms, re.IGNORECASE))
        return f"{text}; {hint.format(prefix=self._prefix)}"


def _place(endpoint: str) -> str:
    """The endpoint as people write it."""
    return endpoint.partition("://")[2]


@contextmanager
def _failures(timeout: type[Away] = Away) -> Iterator[None]:
    """Whatever can go wrong on the way, from a missing certificate file to half an answer, is `Away`."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause = _cause(error)
        if isinstance(cause, TimeoutError):
            raise timeout("no answer") from error
        text = str(getattr(cause, "strerror", None) or cause)
        raise Away(text.partition(" (_ssl")[0]) from error


def _cause(error: BaseException) -> BaseException:
    """What is at the bottom of a failure that requests and urllib3 wrapped."""
    wrapped = (getattr(error, "reason", None), error.__cause__, *error.args)
    inner = next((one for one in wrapped if isinstance(one, BaseException)), None)
    return _cause(inner) if inner else error
