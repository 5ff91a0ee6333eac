"""The few things that the commands ask of a cluster, over the Kubernetes client's dynamic interface.

Objects go in and out as plain dicts. Every failure that a user can do something about becomes an `AceStepError` with the server's words.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acestep.errors import AceStepError, InvalidRequest, Unavailable
from deployments.k8s.extra import needs
from deployments.k8s.findings import items, mapping
from deployments.k8s.groups import NAME

RAY = "ray.io/v1"
FIELD_MANAGER = "acestep-serve"
Document = dict[str, Any]
TIMEOUT_S = (10.0, 30.0)  # to connect, and for an answer
RETRIES = 1


class Cluster:
    """A connection to one namespace.

    Args:
        api: `kubernetes.client.ApiClient`.

    Raises:
        Unavailable: nobody answers.
    """

    def __init__(self, api: Any, namespace: str = NAME) -> None:
        # The client's default cache of kinds is a file with a guessable name in the common temporary folder.
        self._cache = tempfile.TemporaryDirectory(prefix="acestep-k8s-")
        with _spoken("connecting"):
            self._client = _impatient(needs("kubernetes.dynamic").DynamicClient)(
                api, cache_file=f"{self._cache.name}/kinds.json"
            )
        self.namespace = namespace

    @classmethod
    def connect(cls, namespace: str = NAME, context: str | None = None) -> Cluster:
        """By the user's kubeconfig, or the service account inside a pod.

        Raises:
            Unavailable: there is neither, or it cannot be read.
        """
        config, client = needs("kubernetes.config"), needs("kubernetes.client")
        # Each try of a connection is a line on the terminal otherwise; the last one's reason is in the error.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        configuration = client.Configuration()
        configuration.retries = RETRIES
        # The client's own choice between the two overlooks a KUBECONFIG of several files.
        files = os.environ.get("KUBECONFIG") or "~/.kube/config"
        try:
            if context or any(Path(f).expanduser().exists() for f in files.split(os.pathsep)):
                config.load_kube_config(files, context=context, client_configuration=configuration)
            elif "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                raise Unavailable(f"no cluster to talk to: there is no kubeconfig at {files}, and this is no pod")
        except config.ConfigException as error:
            raise Unavailable(
                f"no cluster to talk to: {str(error).rstrip('.')}. Set KUBECONFIG or give --context"
            ) from error
        except OSError as error:
            raise Unavailable(f"cannot read the kubeconfig {error.filename}: {error.strerror}") from error
        except AceStepError:
            raise
        except Exception as error:  # the loader walks the file as it finds it: YAML's errors, KeyError, TypeError, ...
            raise Unavailable(f"the kubeconfig is not one: {type(error).__name__}: {error}") from error
        return cls(client.ApiClient(configuration), namespace)

    def get(self, kind: str, name: str, api_version: str = "v1", *, namespace: str | None = None) -> Document | None:
        """An object, of this namespace unless told otherwise; None where there is none of that name."""
        missing = needs("kubernetes.dynamic.exceptions").NotFoundError
        with _spoken(f"reading {kind} {name}"):
            try:
                found = self._resource(kind, api_version).get(name=name, namespace=namespace or self.namespace)
            except missing:
                return None
            return dict(found.to_dict())

    def find(
        self, kind: str, api_version: str = "v1", *, everywhere: bool = False, selector: str | None = None
    ) -> list[Document]:
        """Objects of a kind, of this namespace or of all."""
        with _spoken(f"listing {kind}s"):
            found = self._resource(kind, api_version).get(
                namespace=None if everywhere else self.namespace, label_selector=selector
            )
            return [dict(item) for item in found.to_dict().get("items", [])]

    def serves(self, kind: str, api_version: str) -> bool:
        """Whether the API server knows a kind."""
        unknown = needs("kubernetes.dynamic.exceptions").ResourceNotFoundError
        with _spoken(f"looking for {kind}"):
            try:
                self._resource(kind, api_version)
            except unknown:
                return False
            return True

    def apply(self, document: Document, *, dry_run: bool = False) -> Document:
        """Server-side apply, as the owner of every field that is named: KubeRay's operator writes into the RayService too, and without
        force the second apply would conflict with it. Returns the object as the server then has it.
        """
        kind, name = str(document["kind"]), str(document["metadata"]["name"])
        with _spoken(f"applying {kind} {name}"):
            resource = self._resource(kind, str(document["apiVersion"]))
            answer = self._client.server_side_apply(
                resource,
                body=document,
                name=name,
                namespace=mapping(document, "metadata").get("namespace") or self.namespace,
                field_manager=FIELD_MANAGER,
                force_conflicts=True,
                dry_run="All" if dry_run else None,
                query_params=[("fieldValidation", "Strict")],
            )
            return dict(answer.to_dict())

    def patch(self, kind: str, name: str, steps: list[Document], api_version: str) -> Document:
        """JSON patch."""
        with _spoken(f"patching {kind} {name}"):
            answer = self._resource(kind, api_version).patch(
                body=steps,
                name=name,
                namespace=self.namespace,
                content_type="application/json-patch+json",
                field_manager=FIELD_MANAGER,
            )
            return dict(answer.to_dict())

    def allowed(self, verb: str, group: str, resource: str, *, namespaced: bool = True) -> bool:
        """Whether the user may do something, asked of the server itself."""
        attributes = {"verb": verb, "group": group, "resource": resource}
        if namespaced:
            attributes["namespace"] = self.namespace
        kind, version = "SelfSubjectAccessReview", "authorization.k8s.io/v1"
        review = {"apiVersion": version, "kind": kind, "spec": {"resourceAttributes": attributes}}
        with _spoken("asking for permissions"):
            answer = self._resource(kind, version).create(body=review)
            return bool(mapping(answer.to_dict(), "status").get("allowed"))

    def _resource(self, kind: str, api_version: str) -> Any:
        # The prefix spares a search through every group that has a version of this name.
        prefix = "apis" if "/" in api_version else "api"
        return self._client.resources.get(prefix=prefix, kind=kind, api_version=api_version)


def _impatient(base: Any) -> Any:
    """The dynamic client with a time limit on every request; its own for discovery have none."""

    class Client(base):
        def request(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
            return super().request(method, path, body, **{"_request_timeout": TIMEOUT_S, **params})

    return Client


@contextmanager
def _spoken(doing: str) -> Iterator[None]:
    """The client's exceptions as this project's."""
    exceptions = needs("kubernetes.dynamic.exceptions")
    transport = needs("urllib3.exceptions")
    try:
        yield
    except exceptions.ResourceNotFoundError as error:
        if "No matches found" not in str(error):
            raise
        raise InvalidRequest(
            f"{doing}: the cluster does not know this kind ({error}). Is its operator installed?", field="kind"
        ) from error
    except exceptions.DynamicApiError as error:
        message = _server_message(error)
        if error.status in (400, 404, 422) or (error.status == 500 and "schema" in message):
            # An unknown field is answered with 500 under server-side apply, a namespace that is not there with 404.
            raise InvalidRequest(f"{doing}: the API server refuses it: {message}", status=error.status) from error
        if error.status in (401, 403):
            raise AceStepError(
                f"{doing}: not allowed: {message}. k8s/rbac.yaml has the roles that are needed", status=error.status
            ) from error
        raise Unavailable(f"{doing}: the API server answers {error.status}: {message}", status=error.status) from error
    except transport.HTTPError as error:
        raise Unavailable(f"{doing}: the API server cannot be reached: {error}") from error


def _server_message(error: Any) -> str:
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return str(error.body or error.reason)
    return str(body.get("message", body)) if isinstance(body, Mapping) else str(body)


def resize_steps(
    document: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], path: tuple[str, ...]
) -> list[Document]:
    """JSON patch that sets minReplicas and maxReplicas of groups of a RayService or RayCluster.

    Args:
        sizes: Group → (least, most).
        path: Where the worker groups are. The patch tests each group's name, so that it fails where somebody else changed the list.

    Raises:
        InvalidRequest: there is no such group.
    """
    groups = [g.get("groupName") for g in items(document, *path)]
    steps: list[Document] = []
    for group, (least, most) in sizes.items():
        if group not in groups:
            raise InvalidRequest(
                f"group: there is no {group!r}; there are {', '.join(map(str, groups))}", field="group", asked=group
            )
        here = f"/{'/'.join(path)}/{groups.index(group)}"
        steps += [
            {"op": "test", "path": f"{here}/groupName", "value": group},
            {"op": "add", "path": f"{here}/minReplicas", "value": least},
            {"op": "add", "path": f"{here}/maxReplicas", "value": most},
        ]
    return steps
