"""The calls to the manager, as the wire contract has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from requests.adapters import HTTPAdapter

LONG_POLL = 25.0  # seconds the manager may take to answer that nothing changed


class _PinnedCertificate(HTTPAdapter):
    """The name in the manager's certificate is always the same; its address is not."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, assert_hostname="lbscaler-manager", **kwargs)


class ManagerClient:
    """The manager's HTTP interface. Every call raises requests.RequestException when the manager is unreachable, or
    answers with an error: 503 while it is ending."""

    def __init__(self, addresses: Sequence[str], token: str, balancer: str = "", certificate: str = "") -> None:
        """`addresses` are where the manager may be, tried in turn. Where there is a certificate, a file with the
        manager's own, it has to present that one, whatever its address: then nobody in between reads or forges."""
        self._balancer = balancer
        self._urls = deque(f"{'https' if certificate else 'http'}://{address}" for address in addresses)
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update({"Authorization": f"Bearer {token}", "Connection": "close"})
        if certificate:
            self._session.verify = certificate
            self._session.mount("https://", _PinnedCertificate())

    def sync(self, have: str) -> Mapping[str, Any] | None:
        """The snapshot, as soon as it is another than `have`; None when it stayed the same for LONG_POLL seconds."""
        query = {"have": have, "wait": str(LONG_POLL)}
        try:
            answer = self._session.get(f"{self._urls[0]}/sync", params=query, timeout=(3, LONG_POLL + 10))
            answer.raise_for_status()
        except requests.RequestException:
            self._urls.rotate(-1)
            raise
        message: Mapping[str, Any] | None = None if answer.status_code == 204 else answer.json()
        return message

    def report(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = self._session.post(f"{self._urls[0]}/pkts_info", json=message, timeout=(3, 5))
        answer.raise_for_status()
        decision: Mapping[str, Any] = answer.json()
        return decision

    def stop(self, ip: str, reason: str) -> None:
        message = {"ip": ip, "reason": reason} | ({"balancer": self._balancer} if self._balancer else {})
        answer = self._session.post(f"{self._urls[0]}/stop", json=message, timeout=(3, 5))
        if answer.status_code != 404:  # unknown to the manager: already gone, which is all we want
            answer.raise_for_status()
