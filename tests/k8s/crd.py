"""KubeRay's own schema of a RayService as a JSON schema that refuses what the API server refuses: unknown fields too, and not a required
field that has a default, because the server fills defaults in first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.k8s.manifests import LOADER, Manifest, mapping

CRD_ENV = "KUBERAY_CRD_DIR"
CRD_FILE = "ray.io_rayservices.yaml"  # in the operator's Helm chart under crds/


def problems(service: Manifest) -> list[str]:
    """Unknown and mistyped fields of a RayService."""
    return [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message[:300]}"
        for e in jsonschema.Draft202012Validator(_schema()).iter_errors(service)
    ]


@cache
def _schema() -> dict[str, Any]:
    folder = os.environ.get(CRD_ENV)
    if not folder:
        pytest.skip(f"{CRD_ENV} does not name the folder of KubeRay's {CRD_FILE}")
    crd = yaml.load((Path(folder) / CRD_FILE).read_text(), Loader=LOADER)
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1" and v["served"])
    schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    # The API server owns these two; their schema is not in the CRD.
    own = {"apiVersion": {"const": "ray.io/v1"}, "metadata": {"type": "object", "required": ["name"]}}
    schema["properties"] |= own
    return schema


def _strict(node: Any) -> Any:
    if not isinstance(node, Mapping):
        return node
    dropped = ("format", "nullable", "default", "allOf", "anyOf", "oneOf")  # the last three repeat int-or-string
    result = {k: v for k, v in node.items() if not k.startswith("x-kubernetes-") and k not in dropped}
    if node.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    if "properties" in node:
        properties = node["properties"]
        result["properties"] = {name: _strict(child) for name, child in properties.items()}
        result["required"] = [n for n in node.get("required", []) if "default" not in mapping(properties, n)]
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), Mapping):
        result["additionalProperties"] = _strict(node["additionalProperties"])
    if isinstance(node.get("items"), Mapping):
        result["items"] = _strict(node["items"])
    if node.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result
