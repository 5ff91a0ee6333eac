"""The cluster, as far as `plan` and `scale` ask it, over the Kubernetes client: plain objects in and out, and errors that say what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config
from urllib3.exceptions import HTTPError

from acestep.errors import InvalidRequest, Unavailable
from deployments.k8s.groups import NAME
from deployments.k8s.manifests import Manifest, items, mapping

RAY, DRA = ("ray.io", "v1"), ("resource.k8s.io", "v1")
TIMEOUT_S = 30.0  # for one answer of the API server


class Cluster:
    """The API server that a context of the kubeconfig names (None: the current one), or that of the pod this runs in.

    Args:
        namespace: Where the fleet's own objects are.

    Raises:
        Unavailable: there is no configuration. All methods: the API server cannot be reached, or does not let this user in.
        InvalidRequest: (all methods) the API server refuses the request.
    """

    def __init__(self, context: str | None = None, namespace: str = NAME) -> None:
        self.namespace = namespace
        self._api = client.ApiClient(_configuration(context))
        self._custom = client.CustomObjectsApi(self._api)  # lists and patches objects of any group, untyped

    def nodes(self) -> list[Manifest]:
        return self._core("nodes", client.CoreV1Api(self._api).list_node)

    def pods(self) -> list[Manifest]:
        """Those of all namespaces."""
        return self._core("pods", client.CoreV1Api(self._api).list_pod_for_all_namespaces)

    def device_objects(self, plural: str) -> list[Manifest]:
        """ResourceSlices or ResourceClaims of all namespaces; none where the cluster is too old for them."""
        with self._spoken(f"listing {plural}"):
            try:
                found = self._custom.list_cluster_custom_object(*DRA, plural, _request_timeout=TIMEOUT_S)
            except client.exceptions.NotFoundException:
                return []
        return list(items(found, "items"))

    def get(self, plural: str, name: str) -> Manifest | None:
        """A RayService or RayCluster, None where there is none of that name."""
        with self._spoken(f"reading {plural} {name}"):
            try:
                found = self._custom.get_namespaced_custom_object(
                    *RAY, self.namespace, plural, name, _request_timeout=TIMEOUT_S
                )
            except client.exceptions.NotFoundException as error:
                if not _status(error):  # not the object, its kind is unknown: then the answer is no Status
                    raise
                return None
        return mapping(found)

    def patch(self, plural: str, name: str, steps: list[dict[str, Any]]) -> None:
        """JSON patch of a RayService or RayCluster."""
        with self._spoken(f"changing {plural} {name}"):
            self._custom.patch_namespaced_custom_object(
                *RAY, self.namespace, plural, name, steps,
                _content_type="application/json-patch+json", _request_timeout=TIMEOUT_S,
            )  # fmt: skip

    def _core(self, plural: str, listing: Any) -> list[Manifest]:
        with self._spoken(f"listing {plural}"):
            # As JSON: the client's own classes take seconds for the pods of a large cluster.
            return list(items(json.loads(listing(_preload_content=False, _request_timeout=TIMEOUT_S).data), "items"))

    @contextmanager
    def _spoken(self, doing: str) -> Iterator[None]:
        """The client's exceptions as this project's."""
        try:
            yield
        except (HTTPError, json.JSONDecodeError) as error:
            raise self._unreachable(doing, error) from error
        except client.ApiException as error:
            said = str(_status(error).get("message") or error.reason)
            if not error.status:  # so it names failures of TLS
                raise self._unreachable(doing, said) from error
            if error.status == 401:
                text = f"the API server does not know this user ({said}): log in anew, or give --context"
            elif error.status == 403:
                text = f"not allowed: {said}. k8s/rbac.yaml has the role that is needed"
            elif error.status == 404 and _status(error):
                raise InvalidRequest(f"{doing}: {said}: it is gone meanwhile. Run it again", field="name") from error
            elif error.status == 404:
                raise InvalidRequest(
                    f"{doing}: the API server does not know this kind: install KubeRay's operator (k8s/README.md)",
                    field="kind",
                ) from error
            elif error.status == 422:
                raise InvalidRequest(
                    f"{doing}: refused: {said}. Were the groups changed meanwhile? Run it again", field="group"
                ) from error
            else:
                text = f"the API server answers {error.status}: {said}. Try again later"
            raise Unavailable(f"{doing}: {text}") from error

    def _unreachable(self, doing: str, reason: object) -> Unavailable:
        return Unavailable(
            f"{doing}: {self._api.configuration.host} cannot be reached: {str(reason).rstrip('.')}. "
            "Does the cluster run? Another one: --context, or KUBECONFIG"
        )


def _configuration(context: str | None) -> Any:
    found = client.Configuration(retries=False)
    # The client's own choice between the two reads KUBECONFIG as one file, and only when it is imported.
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    exists = any(Path(f).expanduser().exists() for f in files.split(os.pathsep) if f)
    try:
        if exists:
            config.load_kube_config(files, context=context, client_configuration=found)
        elif context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=found)
        else:
            raise Unavailable(f"no cluster to talk to: there is no kubeconfig {files}: set KUBECONFIG")
    except config.ConfigException as error:
        raise Unavailable(
            f"no cluster to talk to: {str(error).rstrip('.')}: set KUBECONFIG, or --context to one of `kubectl config get-contexts`"
        ) from error
    # The loader trusts the file's shape.
    except (OSError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise Unavailable(f"no cluster to talk to: {files} is no kubeconfig: {error}: set KUBECONFIG") from error
    return found


def _status(error: client.ApiException) -> Manifest:
    """The API server's `Status`, empty where its answer is none."""
    try:
        return mapping(json.loads(error.body or ""))
    except ValueError:
        return {}
