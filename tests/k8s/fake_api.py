"""As much of a Kubernetes API server, on loopback, as `acestep k8s` needs to read objects and to patch them. It notes what was asked, as RBAC would."""

from __future__ import annotations

import copy
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Document = dict[str, Any]
# kind → (apiVersion, plural, namespaced)
KINDS = {
    "Node": ("v1", "nodes", False),
    "Pod": ("v1", "pods", True),
    "RayService": ("ray.io/v1", "rayservices", True),
    "RayCluster": ("ray.io/v1", "rayclusters", True),
    "ResourceSlice": ("resource.k8s.io/v1", "resourceslices", False),
    "ResourceClaim": ("resource.k8s.io/v1", "resourceclaims", True),
}


@dataclass
class FakeApi:
    """State of the server.

    Attributes:
        objects: By kind, namespace ("" where it has none) and name.
        without: Versions that it does not serve.
        denied: Code and reason of the answer to every request, where it lets nobody in.
        asked: (verb, API group, plural) of every request for objects.
        logins: What was said in the header Authorization.
    """

    objects: dict[tuple[str, str, str], Document] = field(default_factory=dict)
    without: set[str] = field(default_factory=set)
    denied: tuple[int, str] | None = None
    asked: set[tuple[str, str, str]] = field(default_factory=set)
    logins: set[str] = field(default_factory=set)
    url: str = ""

    def put(self, document: Document, namespace: str = "acestep") -> None:
        version, _, namespaced = KINDS[document["kind"]]
        document = {"apiVersion": version, **copy.deepcopy(document)}
        self.objects[document["kind"], namespace if namespaced else "", document["metadata"]["name"]] = document

    def get(self, kind: str, name: str, namespace: str = "acestep") -> Document:
        return self.objects[kind, namespace if KINDS[kind][2] else "", name]

    @contextmanager
    def serve(self, tls: ssl.SSLContext | None = None) -> Iterator[FakeApi]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        try:
            code, answer = 200, self._handle(method, urlsplit(self.path).path, body)
        except _Refused as refused:
            code = refused.code
            answer = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": refused.reason, "code": code}
            answer["message"] = str(refused)
        found = code == 200 or answer["reason"]
        data = json.dumps(answer).encode() if found else str(answer["message"]).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if found else "text/plain")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self, method: str, path: str, body: Any) -> Document:
        parts = path.strip("/").split("/")
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace = ""
        if rest and rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = next((k for k, (v, plural, _) in KINDS.items() if rest and (v, plural) == (version, rest[0])), None)
        if kind is None or version in self.api.without:
            raise _Refused(404, "", "404 page not found")  # what it does not know at all it answers as text
        if self.api.denied:
            raise _Refused(*self.api.denied, f'User "x" and {rest[0]}: {self.api.denied[1]}')
        name = rest[1] if len(rest) > 1 else ""
        verb = {"GET": "get" if name else "list", "PATCH": "patch"}[method]
        self.api.logins.add(self.headers.get("Authorization", ""))
        self.api.asked.add((verb, version.rpartition("/")[0], KINDS[kind][1]))
        if not name:
            items = [
                d for (k, ns, _), d in self.api.objects.items() if k == kind and (not namespace or ns == namespace)
            ]
            return {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items}
        key = (kind, namespace, name)
        if key not in self.api.objects:
            raise _Refused(404, "NotFound", f'{KINDS[kind][1]} "{name}" not found')
        if method == "PATCH":
            assert self.headers["Content-Type"] == "application/json-patch+json"
            self.api.objects[key] = _patched(self.api.objects[key], body)
        return self.api.objects[key]


def _patched(document: Document, steps: list[Document]) -> Document:
    document = copy.deepcopy(document)
    for step in steps:
        *path, last = step["path"].strip("/").split("/")
        target: Any = document
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if step["op"] == "test" and target.get(last) != step["value"]:
            raise _Refused(422, "Invalid", f"the test of {step['path']} failed")
        target[last] = step["value"]
    return document
