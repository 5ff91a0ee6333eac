"""kubectl, for the two commands that need a cluster: it knows kubeconfigs, logins and proxies, and says in its own words what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from acestep.errors import InvalidRequest, Unavailable
from deployments.k8s.manifests import Manifest, items

TIMEOUT_S = 30  # for one answer of the API server


class Kubectl:
    """kubectl with a context (None: the current one) and a namespace (None: that of the context).

    Raises:
        InvalidRequest: it is not on the PATH.
        Unavailable: (all methods) it fails; the message is its own.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        program = shutil.which("kubectl")
        if program is None:
            raise InvalidRequest("kubectl is not on the PATH: https://kubernetes.io/docs/tasks/tools", field="kubectl")
        options = {"--context": context, "--namespace": namespace, "--request-timeout": f"{TIMEOUT_S}s"}
        self._command = [program, *(f"{k}={v}" for k, v in options.items() if v is not None)]

    def get(self, kind: str, name: str) -> Mapping[str, Any] | None:
        """An object, None where there is none of that name."""
        answer = self._run("get", kind, name, "--ignore-not-found", "--output=json")
        return dict(json.loads(answer)) if answer.strip() else None

    def find(self, *kinds: str) -> list[Manifest]:
        """All objects of these kinds, of all namespaces; each says its `kind`."""
        return list(items(json.loads(self._run("get", ",".join(kinds), "--all-namespaces", "--output=json")), "items"))

    def serves(self, version: str) -> bool:
        """Whether the API server knows a version of a group, such as `resource.k8s.io/v1`."""
        return version in self._run("api-versions").split()

    def patch(self, kind: str, name: str, steps: list[dict[str, Any]]) -> None:
        """JSON patch."""
        self._run("patch", kind, name, "--type=json", f"--patch={json.dumps(steps)}")

    def _run(self, verb: str, *arguments: str) -> str:
        done = subprocess.run([*self._command, verb, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"kubectl {verb}: {done.stderr.strip()}")
        return done.stdout
