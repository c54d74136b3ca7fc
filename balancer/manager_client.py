"""The balancer's calls to the manager's HTTP interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter

LONG_POLL = 25.0  # seconds after which the manager answers that nothing changed


class _PinnedCertificate(HTTPAdapter):
    """Checks the certificate's name, which is always the same, instead of the manager's address."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, assert_hostname="lbscaler-manager", **kwargs)


class TextFile:
    """The token, or the manager's address. Reads the file for each call, because `run.sh` may replace it meanwhile."""

    def __init__(self, file: Path) -> None:
        self._file, self._last = file, ""

    def __call__(self) -> str:
        with suppress(OSError):  # the file was deleted
            # It is empty for a moment while it is written.
            self._last = self._file.read_text().strip() or self._last
        return self._last

    def __iter__(self) -> Iterator[str]:
        """As a list of one address."""
        yield self()


class ManagerClient:
    """Every call raises requests.RequestException when the manager is unreachable or answers with an error, such as 503
    while it shuts down."""

    def __init__(self, addresses: Iterable[str], token: Callable[[], str], certificate: str = "") -> None:
        """`addresses` are those that the manager may have, tried in turn. They are read, and `token` is called, for
        each request. `certificate` is a file with the manager's certificate: calls then use TLS and accept no other."""
        self._token, self._addresses = token, addresses
        self._scheme = "https" if certificate else "http"
        self._failures = 0  # of calls to `sync`
        self._session = requests.Session()
        # HTTP_PROXY and the like are for other programs: the manager is always called directly.
        self._session.trust_env = False
        self._session.auth = self._authorize
        self._session.headers["Connection"] = "close"
        if certificate:
            self._session.verify = certificate
            self._session.mount("https://", _PinnedCertificate())

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token()}"
        return request

    def sync(self, have: str) -> Mapping[str, Any] | None:
        """Waits for a snapshot whose revision is not `have`; None if there is none within LONG_POLL seconds."""
        query = {"have": have, "wait": str(LONG_POLL)}
        try:
            answer = self._session.get(self._url("/sync"), params=query, timeout=(3, LONG_POLL + 10))
            _raise_for_status(answer)
        except requests.RequestException:
            # All further calls use the next address, in case the manager now runs on another node.
            self._failures += 1
            raise
        message: Mapping[str, Any] | None = None if answer.status_code == 204 else answer.json()
        return message

    def report(self, message: Mapping[str, Any]) -> None:
        _raise_for_status(self._post("/pkts_info", message))

    def stop(self, ip: str, id_: str, reason: str) -> None:
        answer = self._post("/stop", {"ip": ip, "id": id_, "reason": reason})
        # With 404 the manager does not know the backend, so it was removed already.
        if answer.status_code != 404:
            _raise_for_status(answer)

    def _post(self, path: str, message: Mapping[str, Any]) -> requests.Response:
        return self._session.post(self._url(path), json=message, timeout=(3, 5))

    def _url(self, path: str) -> str:
        addresses = list(self._addresses)
        return f"{self._scheme}://{addresses[self._failures % len(addresses)]}{path}"


def _raise_for_status(answer: requests.Response) -> None:
    """As the method of that name, with the manager's own reason in the error: it answers with one line of text."""
    if answer.status_code >= 400:
        reason, _, _ = answer.text.partition("\n")
        raise requests.HTTPError(f"{answer.status_code}: {reason}", response=answer)
