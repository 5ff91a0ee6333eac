"""Strict schemas: Kubernetes' own kinds from `kubernetes-validate`, a RayService from KubeRay's CustomResourceDefinition.

The second is made from the CRD's OpenAPI schema so that it refuses what the API server refuses: unknown fields too, and not a required field
that has a default, because the server fills defaults in first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from acestep.errors import InvalidRequest
from deployments.k8s.extra import needs
from deployments.k8s.findings import Finding, error, items, name_of, pod_templates

KUBERNETES_VERSION = "1.36"
CRD_ENV = "KUBERAY_CRD_DIR"
CRD_FILE = "ray.io_rayservices.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster in C, and there are megabytes


def check_core(document: Mapping[str, Any]) -> Iterator[Finding]:
    """One object of a kind that Kubernetes itself defines; a note for other kinds."""
    validate = needs("kubernetes_validate")
    try:
        validate.validate(document, KUBERNETES_VERSION, strict=True)
    except validate.SchemaNotFoundError:
        yield Finding(
            "note",
            name_of(document),
            f"{document.get('apiVersion')} is no kind of Kubernetes itself; its fields were not checked",
        )
    except validate.ValidationError as found:
        path = "/".join(str(p) for p in found.path)
        yield error(f"{name_of(document)} {path}".rstrip(), found.message)


def check_pods(service: Mapping[str, Any]) -> Iterator[Finding]:
    """The pod templates of a RayService as the pods they will become."""
    for name, template in pod_templates(service):
        metadata = template.get("metadata", {})
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **metadata} if isinstance(metadata, Mapping) else metadata,
            "spec": template.get("spec"),
        }
        for found in check_core(pod):
            yield Finding(
                found.level, f"{name_of(service)} {name} {found.where.partition(' ')[2]}".rstrip(), found.message
            )


def find_crd(path: Path | None = None) -> Path | None:
    """The CRD file: as given, or `ray.io_rayservices.yaml` in the folder that KUBERAY_CRD_DIR names; None without either.

    Raises:
        InvalidRequest: it is named but not there.
    """
    folder = os.environ.get(CRD_ENV, "").strip()
    if path is None:
        if not folder:
            return None
        path = Path(folder) / CRD_FILE
    elif path.is_dir():
        path = path / CRD_FILE
    if not path.is_file():
        raise InvalidRequest(f"there is no CRD at {path}. It is in KubeRay's Helm chart: crds/{CRD_FILE}", field="crd")
    return path


def rayservice_schema(crd: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of `ray.io/v1` from the CRD.

    Raises:
        InvalidRequest: it serves no `v1` (KubeRay older than 1.0), or is no CRD.
    """
    for version in items(crd, "spec", "versions"):
        if version.get("name") == "v1" and version.get("served"):
            schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
            # The API server owns these two; their schema is not in the CRD.
            schema["properties"] |= {
                "apiVersion": {"const": "ray.io/v1"},
                "metadata": {"type": "object", "required": ["name"]},
            }
            return schema
    raise InvalidRequest("the CRD does not serve ray.io/v1 RayService; KubeRay 1.7 or newer is needed", field="crd")


def read_schema(path: Path) -> dict[str, Any]:
    """JSON schema of `ray.io/v1` RayServices from KubeRay's CRD file."""
    return rayservice_schema(load_crd(path))


def load_crd(path: Path) -> dict[str, Any]:
    crd: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    return crd


def check_rayservice(service: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Finding]:
    """Unknown and mistyped fields of a RayService."""
    jsonschema = needs("jsonschema")
    for found in jsonschema.Draft202012Validator(schema).iter_errors(service):
        path = "/".join(str(p) for p in found.absolute_path)
        yield error(f"{name_of(service)} {path}".rstrip(), found.message[:400])


def _strict(node: Any) -> Any:
    """An OpenAPI v3 structural schema as a JSON schema that refuses unknown fields."""
    if not isinstance(node, Mapping):
        return node
    if node.get("x-kubernetes-int-or-string"):
        result: dict[str, Any] = {"type": ["integer", "string"]}
    else:
        result = {
            k: v
            for k, v in node.items()
            if not k.startswith("x-kubernetes-") and k not in ("format", "nullable", "default")
        }
    if "properties" in node:
        properties = node["properties"]
        result["properties"] = {name: _strict(child) for name, child in properties.items()}
        required = [name for name in node.get("required", []) if "default" not in properties.get(name, {})]
        result.pop("required", None)
        if required:
            result["required"] = required
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), Mapping):
        result["additionalProperties"] = _strict(node["additionalProperties"])
    if isinstance(node.get("items"), Mapping):
        result["items"] = _strict(node["items"])
    for key in ("allOf", "anyOf", "oneOf"):
        result.pop(key, None)  # in a structural schema they repeat what int-or-string says
    if node.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result
