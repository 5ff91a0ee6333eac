"""Somebody without Ray's token, and as another user of the machine, tries every port that the server opens."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import ray
import ray.core.generated
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.server import Server

pytestmark = pytest.mark.e2e
TIMEOUT_S = 5.0
REFUSED, UNKNOWN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED
GRPCS_OWN = "/grpc."  # health, reflection and channelz, which Ray opens to everybody: names of services and connections, no deeds
JOB = {"entrypoint": "touch {mark}", "runtime_env": {}, "metadata": {}}
APPLICATIONS = {"applications": [{"name": "x", "route_prefix": "/x", "import_path": "antigravity:x"}]}
# Method, path and body of what Ray's HTTP servers do or tell: dashboard, agents, job and runtime-environment servers.
REQUESTS: list[tuple[str, str, Any]] = [
    ("POST", "/api/jobs/", JOB),
    ("GET", "/api/jobs/", None),
    ("POST", "/api/job_agent/jobs/", JOB),
    ("PUT", "/api/serve/applications/", APPLICATIONS),
    ("DELETE", "/api/serve/applications/", None),
    ("GET", "/api/serve/applications/", None),
    ("POST", "/api/packages/gcs/_ray_pkg_0.zip", "x"),
    ("PUT", "/api/packages/gcs/_ray_pkg_0.zip", "x"),
    ("POST", "/get_or_create_runtime_env", "x"),
    ("POST", "/delete_runtime_env_if_possible", "x"),
    ("GET", "/api/v0/actors", None),
    ("GET", "/api/v0/logs", None),
    ("GET", "/api/v0/logs/file?filename=raylet.out", None),
    ("GET", "/nodes?view=summary", None),
    ("GET", "/logical/actors", None),
    ("GET", "/logical/kill_actor?actor_id=0", None),
    ("GET", "/worker/traceback?pid=1", None),
    ("GET", "/worker/cpu_profile?pid=1", None),
    ("GET", "/memory_profile?pid=1", None),
]


class Mark:
    """Unpickled, it runs a command: the proof that somebody else's code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", str(self.path)],)


@dataclass(frozen=True)
class Door:
    """A port on which a process of the server listens."""

    process: str
    bound: str
    port: int

    @property
    def host(self) -> str:
        return "127.0.0.1" if self.bound in ("0.0.0.0", "::") else self.bound

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


@pytest.fixture(scope="module")
def doors(server: Server) -> list[Door]:
    found = {}
    for pid in server.pids(""):
        try:
            process = psutil.Process(pid)
            for listener in process.net_connections("tcp"):
                if listener.status == psutil.CONN_LISTEN:
                    bound = listener.laddr.ip.removeprefix("::ffff:")
                    found[listener.laddr.port] = Door(" ".join(process.cmdline()).strip(), bound, listener.laddr.port)
        except psutil.Error:
            continue  # it ended meanwhile
    # Replicas first: what they unpickle would run, while among the others' methods are some that end a process.
    return sorted(found.values(), key=lambda door: "ServeReplica" not in door.process)


def calls(payload: bytes) -> dict[str, bytes]:
    """Every gRPC method that Ray and Serve have, with a request whose every field of bytes is `payload`."""
    modules = [f"ray.core.generated.{m.name}" for m in pkgutil.iter_modules(ray.core.generated.__path__)]
    found = {}
    for name in ("ray.serve.generated.serve_pb2", *modules):
        if name.endswith("_pb2"):
            for service in importlib.import_module(name).DESCRIPTOR.services_by_name.values():
                for method in service.methods:
                    found[f"/{service.full_name}/{method.name}"] = filled(method.input_type, payload)
    programs = Path(ray.__file__).parent / "core/src/ray"
    for program in ("raylet/raylet", "gcs/gcs_server"):
        for known in re.findall(rb"/(?:ray\.rpc|grpc)[\w.]*/[A-Z]\w+", (programs / program).read_bytes()):
            found.setdefault(known.decode(), b"")
    return found


def filled(message: Any, payload: bytes) -> bytes:
    request = GetMessageClass(message)()
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_BYTES:
            if field.is_repeated:
                getattr(request, field.name).append(payload)
            else:
                setattr(request, field.name, payload)
    return bytes(request.SerializeToString())


def code_of(channel: grpc.Channel, path: str, request: bytes) -> grpc.StatusCode:
    try:
        channel.unary_unary(path)(request, timeout=TIMEOUT_S, metadata=[("node_id", "00" * 28)])
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


def test_from_other_machines_only_replicas_can_be_reached(doors: list[Door]) -> None:
    """Serve binds their ports to all addresses, whatever one says."""
    assert {d.process.split(":")[2] for d in doors if d.bound != "127.0.0.1"} <= {"ServeReplica"}, doors
    assert len(doors) > 10


def test_grpc_needs_the_token_on_every_port(server: Server, doors: list[Door], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    serving = server.pids("ray::Serve")
    requests = calls(pickle.dumps(Mark(mark)))
    refused: dict[Door, set[str]] = {}
    answered = []
    for door in doors:
        with grpc.insecure_channel(door.address) as channel:
            if code_of(channel, "/nobody.Knows/This", b"") not in (REFUSED, UNKNOWN):
                continue  # speaks something else
            refused[door] = set()
            for path, request in requests.items():
                code = code_of(channel, path, request)
                if code == REFUSED:
                    refused[door].add(path.split("/")[1])
                elif code == grpc.StatusCode.UNAVAILABLE:
                    break  # a worker that was not needed any more ended
                elif code != UNKNOWN and not path.startswith(GRPCS_OWN):
                    answered.append(f"{door}: {path}: {code.name}")
                assert not mark.exists(), f"{door} ran what it was sent by {path}"
    assert not answered, "\n".join(answered)
    services = set().union(*refused.values())
    wanted = {
        "JobInfoGcsService",
        "InternalKVGcsService",
        "NodeManagerService",
        "CoreWorkerService",
        "ObjectManagerService",
    }
    assert services >= {f"ray.rpc.{name}" for name in wanted}, services
    replicas = [d for d, seen in refused.items() if "ServeReplica" in d.process and "ray.serve.ASGIService" in seen]
    assert len(replicas) >= 3, refused  # router, planner, renderer
    assert server.pids("ray::Serve") == serving


def test_rays_http_servers_need_the_token(server: Server, doors: list[Door], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    answered, refused = [], set()
    for door in doors:
        if door.port == server.port:
            continue  # our own API, whose paths others tests try
        url = f"http://{door.address}"
        try:
            exporter = httpx.get(url + "/nothing/here", timeout=TIMEOUT_S).text.startswith("# HELP")
        except httpx.TransportError:
            continue  # speaks something else
        for method, path, body in REQUESTS:
            body = {**body, "entrypoint": f"touch {mark}"} if body is JOB else body
            sent = {"json": body} if isinstance(body, dict) else {"content": body}
            answer = httpx.request(method, url + path, timeout=TIMEOUT_S, **sent)
            if answer.status_code == 401:
                refused.add(path)
            elif answer.is_success and not (exporter and answer.text.startswith("# HELP")):
                answered.append(f"{door}: {method} {path}: {answer.status_code} {answer.text[:100]}")
    assert not answered, "\n".join(answered)
    assert refused >= {"/api/jobs/", "/api/serve/applications/", "/get_or_create_runtime_env"}
    assert not mark.exists()
    assert server.wait_for("/readyz").status_code == 200


def test_what_is_sent_as_it_is_runs_nothing(server: Server, doors: list[Door], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(Mark(mark))
    for door in doors:
        for data in (payload, len(payload).to_bytes(4, "big") + payload):
            with socket.create_connection((door.host, door.port), TIMEOUT_S) as connection:
                connection.sendall(data)
    assert server.wait_for("/readyz").status_code == 200
    assert not mark.exists()


def test_the_token_is_for_its_user_alone(server: Server, tmp_path: Path) -> None:
    token = server.home / "ray-token"
    assert token.stat().st_mode & 0o777 == 0o600
    headers = server.ray_headers
    doors = re.findall(r"dashboard at \S*?(http://127\.0\.0\.1:\d+)", re.sub(r"\x1b\[\d*m", "", server.output()))
    assert httpx.get(f"{doors[-1]}/api/jobs/", headers=headers).status_code == 200
    assert httpx.get(f"{doors[-1]}/api/jobs/", headers={"Authorization": "Bearer wrong"}).status_code == 403
    for pid in server.pids("ray::"):  # not where every user could read it, either
        assert headers["Authorization"].split()[1] not in Path(f"/proc/{pid}/cmdline").read_text()


def test_the_start_says_what_listens_and_what_it_needs(server: Server) -> None:
    log = server.output()
    assert f"HTTP on 127.0.0.1:{server.port}: needs no key" in log
    for what in ("dashboard", "GCS", "raylets and workers on 127.0.0.1", "replicas on all addresses"):
        assert re.search(rf"{what}.* need\w* the token", log), what
