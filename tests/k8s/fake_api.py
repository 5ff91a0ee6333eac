"""A small Kubernetes API server on loopback, for the client code: discovery, reads, server-side apply, JSON patch, access reviews.

It validates RayServices with KubeRay's CRD where a schema is given, answers as the real server was seen to (201 for what an apply creates, 500 for an
unknown field under server-side apply, 409 without force), and records every write.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deployments.k8s.schema import check_rayservice

Document = dict[str, Any]
# kind → (apiVersion, plural, namespaced)
KINDS = {
    "Namespace": ("v1", "namespaces", False),
    "Node": ("v1", "nodes", False),
    "Pod": ("v1", "pods", True),
    "Event": ("v1", "events", True),
    "ConfigMap": ("v1", "configmaps", True),
    "ServiceAccount": ("v1", "serviceaccounts", True),
    "Service": ("v1", "services", True),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims", True),
    "RayService": ("ray.io/v1", "rayservices", True),
    "RayCluster": ("ray.io/v1", "rayclusters", True),
    "Deployment": ("apps/v1", "deployments", True),
    "Job": ("batch/v1", "jobs", True),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets", True),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies", True),
    "StorageClass": ("storage.k8s.io/v1", "storageclasses", False),
    "ResourceSlice": ("resource.k8s.io/v1", "resourceslices", False),
    "ResourceClaim": ("resource.k8s.io/v1", "resourceclaims", True),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "SelfSubjectAccessReview": ("authorization.k8s.io/v1", "selfsubjectaccessreviews", False),
}


@dataclass
class Write:
    """One changing request."""

    method: str
    kind: str
    name: str
    query: dict[str, str]
    content_type: str
    body: Any

    @property
    def dry(self) -> bool:
        return self.query.get("dryRun") == "All"


@dataclass
class FakeApi:
    """State of the server. `allowed` decides on access reviews; `fail` maps (method, kind) to a status that is answered instead."""

    schema: Document | None = None
    objects: dict[tuple[str, str, str], Document] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    denied: set[tuple[str, str]] = field(default_factory=set)
    fail: dict[tuple[str, str], int] = field(default_factory=dict)
    managers: dict[tuple[str, str, str], str] = field(default_factory=dict)
    asked: set[tuple[str, str, str]] = field(default_factory=set)  # (verb, API group, plural) as RBAC would be asked
    paths: list[str] = field(default_factory=list)
    url: str = ""

    def put(self, document: Document, namespace: str = "acestep") -> None:
        """As if somebody else had made it."""
        kind = document["kind"]
        document = copy.deepcopy(document)
        document.setdefault("apiVersion", KINDS[kind][0])
        document["metadata"].setdefault("generation", 1)
        self.objects[kind, namespace if KINDS[kind][2] else "", document["metadata"]["name"]] = document

    def get(self, kind: str, name: str, namespace: str = "acestep") -> Document:
        return self.objects[kind, namespace if KINDS[kind][2] else "", name]

    @contextmanager
    def serve(self) -> Iterator[FakeApi]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Handler(BaseHTTPRequestHandler):
    api: FakeApi
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: two would wait 40 ms for each other

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None  # what the client sends as YAML is JSON
        try:
            code, answer = self._handle(method, body)
        except _Refused as refused:
            code = refused.code
            answer = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(refused), "code": code}
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self, method: str, body: Any) -> tuple[int, Document]:
        split = urlsplit(self.path)
        self.api.paths.append(split.path)
        query = {k: v[0] for k, v in parse_qs(split.query).items()}
        found = discovery(split.path)
        if found is not None:
            return 200, found
        kind, namespace, name = _parse(split.path)
        if status := self.api.fail.get((method, kind)):
            raise _Refused(status, f"{kind} is out of order")
        verb = {"GET": "get" if name else "list", "POST": "create", "PATCH": "patch"}[method]
        self.api.asked.add((verb, KINDS[kind][0].rpartition("/")[0], KINDS[kind][1]))
        if method == "GET":
            return 200, self._read(kind, namespace, name, query)
        write = Write(method, kind, name, query, self.headers.get("Content-Type", ""), copy.deepcopy(body))
        self.api.writes.append(write)
        if kind == "SelfSubjectAccessReview":
            asked = body["spec"]["resourceAttributes"]
            return 201, body | {"status": {"allowed": (asked["verb"], asked["resource"]) not in self.api.denied}}
        if write.content_type == "application/apply-patch+yaml":
            return self._apply(write, namespace)
        if write.content_type == "application/json-patch+json":
            return 200, self._json_patch(write, namespace)
        raise _Refused(415, f"unsupported: {method} {write.content_type}")

    def _read(self, kind: str, namespace: str, name: str, query: dict[str, str]) -> Document:
        api_version, plural, _ = KINDS[kind]
        if name:
            if (kind, namespace, name) not in self.api.objects:
                raise _Refused(404, f'{plural} "{name}" not found')
            return self.api.objects[kind, namespace, name]
        wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
        items = [
            document
            for (k, ns, _), document in self.api.objects.items()
            if k == kind
            and (not namespace or ns == namespace)
            and wanted.items() <= document["metadata"].get("labels", {}).items()
        ]
        return {"kind": f"{kind}List", "apiVersion": api_version, "metadata": {}, "items": items}

    def _apply(self, write: Write, namespace: str) -> tuple[int, Document]:
        key = (write.kind, namespace, write.name)
        live = self.api.objects.get(key)
        self.api.asked |= {("create", KINDS[write.kind][0].rpartition("/")[0], KINDS[write.kind][1])} - {
            ("create", "", "namespaces")
        }
        if KINDS[write.kind][2] and ("Namespace", "", namespace) not in self.api.objects:
            raise _Refused(404, f'namespaces "{namespace}" not found')
        if write.kind == "RayService" and self.api.schema is not None:
            for finding in check_rayservice(write.body, self.api.schema):
                if "Additional properties" in finding.message:
                    raise _Refused(
                        500, f"failed to create typed patch object: {finding.message}: field not declared in schema"
                    )
                raise _Refused(422, finding.message)
        if not write.query.get("fieldManager"):
            raise _Refused(400, "fieldManager is required for apply patch")
        owner = self.api.managers.get(key, write.query["fieldManager"])
        if live is not None and owner != write.query["fieldManager"] and write.query.get("force", "").lower() != "true":
            raise _Refused(
                409, f'Apply failed with 1 conflict: conflict with "{owner}": .spec.rayClusterConfig.workerGroupSpecs'
            )
        result = _merged(live or {}, write.body)
        if write.kind == "Job" and live is not None and live["spec"]["template"] != result["spec"]["template"]:
            raise _Refused(422, f'Job.batch "{write.name}" is invalid: spec.template: field is immutable')
        result["metadata"]["generation"] = (live or {}).get("metadata", {}).get("generation", 0) + (
            live is None or live.get("spec") != result.get("spec")
        )
        result["metadata"].setdefault("namespace", namespace)
        if not write.dry:
            self.api.objects[key] = result
        return 200 if live is not None else 201, result

    def _json_patch(self, write: Write, namespace: str) -> Document:
        document = copy.deepcopy(self._read(write.kind, namespace, write.name, {}))
        for step in write.body:
            *path, last = step["path"].strip("/").split("/")
            target: Any = document
            for part in path:
                target = target[int(part)] if isinstance(target, list) else target[part]
            if step["op"] == "test":
                if target[last] != step["value"]:
                    raise _Refused(422, f"test of {step['path']} failed")
            else:
                target[last] = step["value"]
        self.api.objects[write.kind, namespace, write.name] = document
        return document


def _merged(old: Any, new: Any) -> Any:
    """Applied fields over the live ones: maps merge, lists are replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            k: _merged(old.get(k), new[k]) if k in new else copy.deepcopy(old[k])
            for k in [*old, *(k for k in new if k not in old)]
        }
    return copy.deepcopy(new)


def _parse(path: str) -> tuple[str, str, str]:
    """(kind, namespace, name) of a request's path."""
    parts = path.strip("/").split("/")
    api_version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    kind = next((k for k, (v, plural, _) in KINDS.items() if (v, plural) == (api_version, rest[0])), None)
    if kind is None:
        raise _Refused(404, f"the server could not find the requested resource {path}")
    return kind, namespace, rest[1] if len(rest) > 1 else ""


def discovery(path: str) -> Document | None:
    """What the client asks for before it asks for objects."""
    groups = sorted({v for v, _, _ in KINDS.values() if "/" in v})
    if path == "/version":
        return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = [(g, {"groupVersion": g, "version": g.partition("/")[2]}) for g in groups]
        return {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [{"name": g.partition("/")[0], "versions": [v], "preferredVersion": v} for g, v in listed],
        }
    version = "v1" if path == "/api/v1" else path.removeprefix("/apis/")
    if version != "v1" and version not in groups:
        return None
    resources = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": namespaced,
            "kind": kind,
            "verbs": ["create", "get", "list", "patch"],
        }
        for kind, (v, plural, namespaced) in KINDS.items()
        if v == version
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
