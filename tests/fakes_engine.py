"""A Docker Engine for tests of run.sh and stop.sh: its API on a Unix socket, with containers that are only entries.

All images exist. A container of the project exists while its file does: STATE/balancer, which the fake manager makes,
and STATE/check, which the fake client program makes. Networks, secrets, services and nodes are kept in memory.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Answer = tuple[int, Any]
NOT_FOUND: Answer = (404, {"message": "no such object"})
DONE: Answer = (204, None)


class FakeEngine:
    def __init__(self, state: Path) -> None:
        self.state = state
        self._place = tempfile.TemporaryDirectory(prefix="engine")  # a socket's path has at most 107 characters
        self.socket = Path(self._place.name, "docker.sock")
        self.calls: list[str] = []  # METHOD /path, in order
        self.ids: dict[str, str] = {}  # image name: id, where that is not sha256:NAME
        self.subnets_requested: list[str] = []
        self.network_options: dict[str, str] = {}  # of the last network that was created
        self.refusal, self.refusals = "", 0  # of that many network creations
        self.removal_seconds = 0.0  # how long the removal of a network takes
        self.extra: list[str] = []  # names of containers that cannot be removed
        self.removed_already = False  # by another program, which is still at it
        self.networks: list[dict[str, Any]] = []
        self.swarm = {"LocalNodeState": "inactive", "ControlAvailable": False, "NodeID": "this-node"}
        self.secrets: dict[str, dict[str, Any]] = {}  # by name
        self.secrets_in_use: set[str] = set()  # names
        self.services: list[dict[str, Any]] = []  # as they were created
        self.running_services: list[str] = []
        self.nodes = [{"ID": "this-node", "Version": {"Index": 1}, "Spec": {"Labels": {}}}]
        self.unreadable_secret = ""  # a file of a task that cannot be read
        self._commands: dict[str, list[str]] = {}
        self._server = _server(self.socket, self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._place.cleanup()

    def is_empty(self) -> bool:
        return not self.networks and not any((self.state / name).exists() for name in ("balancer", "check"))

    # -- the API: one method per kind of object ------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        self.calls.append(f"{method} {path}")
        kind, _, name = path.strip("/").partition("/")
        if kind == "_ping":
            return 200, b"OK"
        if kind in ("version", "info"):
            return 200, {"ApiVersion": "1.41", "Swarm": self.swarm}
        filters = json.loads(query.get("filters", "{}"))
        handler = getattr(self, f"_{kind}", None)
        return handler(method, name, filters, body) if handler else NOT_FOUND

    def _images(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        name = name.removesuffix("/json")
        default = name if name.startswith("sha256:") else f"sha256:{name}"
        return 200, {"Id": self.ids.get(name, default), "RepoTags": [name]}

    def _containers(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        names = [one for one in ("balancer", "check") if (self.state / one).exists()] + self.extra
        if self.running_services:
            names.append("task")
        if name == "json":
            labels = " ".join(filters.get("label", []))
            role = labels.partition("lbscaler.role=")[2]
            if "service.name" in labels:
                role = "task"
            chosen = [one for one in names if role in ("", one) and (one != "task" or role == "task")]
            return 200, [{"Id": one} for one in chosen]
        name, _, action = name.partition("/")
        if name not in names:
            return NOT_FOUND
        if action == "exec":
            self._commands[name] = body["Cmd"]
            return 201, {"Id": name}
        if method == "DELETE" and name not in self.extra:
            (self.state / name).unlink()
            if self.removed_already:
                return 409, {"message": f"removal of container {name} is already in progress"}
        return (200, {"Id": name, "Name": f"/{name}", "Config": {"Labels": {}}}) if method == "GET" else DONE

    def _exec(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        """A task's own secrets, with `cat`; any other command prints nothing."""
        command = self._commands[name.partition("/")[0]]
        file = command[-1].rpartition("/")[2]
        text = b""
        for secret in self.secrets.values():
            if command[0] == "cat" and secret["Spec"]["Labels"].get("lbscaler.role") == file:
                text = base64.b64decode(secret["Spec"]["Data"])
        failed = file == self.unreadable_secret
        if method == "GET":
            return 200, {"ExitCode": int(failed)}
        text = b"no such file" if failed else text
        return 200, struct.pack(">BxxxL", 1, len(text)) + text

    def _networks(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        if name == "create":
            subnet = body["IPAM"]["Config"][0]["Subnet"]
            self.subnets_requested.append(subnet)
            self.network_options = body["Options"] or {}
            if len(self.subnets_requested) <= self.refusals:
                return 403, {"message": self.refusal}
            pool = {"Subnet": subnet, "Gateway": "127.0.0.1"}  # where the fake manager listens
            network = {"Id": "network-id", "Name": body["Name"], "Driver": "bridge", "Containers": {}}
            self.networks.append({**network, "IPAM": {"Config": [pool]}, "Labels": body["Labels"]})
            return 201, {"Id": "network-id"}
        if method == "DELETE":
            time.sleep(self.removal_seconds)
            self.networks.clear()
            return DONE
        if name:
            return (200, self.networks[0]) if self.networks else NOT_FOUND
        return 200, self.networks

    # -- a Swarm ------------------------------------------------------------------------------------------------------

    def _nodes(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        if name.endswith("/update"):
            self.nodes[0]["Spec"] = body
            return 200, None
        return 200, self.nodes[0] if name else self.nodes

    def _secrets(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        if name == "create":
            created = f"2026-11-30T00:00:{len(self.secrets):02}Z"
            self.secrets[body["Name"]] = {"ID": body["Name"], "Spec": body, "CreatedAt": created}
            return 201, {"ID": body["Name"]}
        if not name:
            wanted = {tuple(label.split("=", 1)) for label in filters.get("label", [])}
            return 200, [one for one in self.secrets.values() if wanted <= one["Spec"]["Labels"].items()]
        if name not in self.secrets:
            return NOT_FOUND
        if method == "DELETE" and name in self.secrets_in_use:
            return 400, {"message": "secret is in use"}
        if method == "DELETE":
            del self.secrets[name]
            return DONE
        return 200, self.secrets[name]

    def _services(self, method: str, name: str, filters: Any, body: Any) -> Answer:
        if name == "create":
            self.services.append(body)
            self.running_services.append(body["Name"])
            return 201, {"ID": body["Name"]}
        if method == "DELETE":
            self.running_services.remove(name)
            return 200, None
        if name:
            return 200, {"ID": name, "Spec": self.services[-1]}
        running = [spec for spec in self.services if spec["Name"] in self.running_services]
        return 200, [{"ID": spec["Name"], "Spec": spec} for spec in running]


def _server(path: Path, engine: FakeEngine) -> UnixStreamServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            plain = re.sub(r"^/v[0-9.]+", "", unquote(parts.path))
            code, answer = engine.answer(self.command, plain, query, json.loads(body or "null"))
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            if isinstance(answer, bytes):  # a raw stream: the client reads until the end of the connection
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.flush()
                time.sleep(0.05)
            elif code == 204:
                data = b""
                self.end_headers()
            else:
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
            self.wfile.write(data)

        do_POST = do_DELETE = do_GET  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingMixIn, UnixStreamServer):
        daemon_threads = True

    return Server(str(path), Handler)
