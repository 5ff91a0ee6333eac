"""Applying the fleet's objects: all of them are tried and compared first, so that what the API server or we refuse leaves nothing half done."""

from __future__ import annotations

from collections.abc import Callable

from acestep.errors import InvalidRequest
from deployments.k8s.changes import Change, Effect, classify, object_differences
from deployments.k8s.check import rayservice_of
from deployments.k8s.cluster import RAY, Cluster, Document
from deployments.k8s.findings import mapping


def apply_all(
    cluster: Cluster,
    documents: list[Document],
    *,
    allow_new_cluster: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Change:
    """Try everything, say what changes, then apply, the RayService last.

    Raises:
        InvalidRequest: the API server refuses an object, or the RayService's change would start a second cluster and that was not allowed;
            nothing was applied.
    """
    service = rayservice_of(documents)
    for kind, version in sorted({(d["kind"], d["apiVersion"]) for d in documents}):
        if not cluster.serves(kind, version):
            raise InvalidRequest(
                f"the cluster does not know {version} {kind}: install what defines it, or leave its component out. Nothing was applied",
                field="manifests",
            )
    namespaces = [d for d in documents if d["kind"] == "Namespace"]
    ordered = namespaces + [d for d in documents if d["kind"] not in ("Namespace", "RayService")] + [service]
    # In a namespace that is not there yet nothing can be tried; but then nothing runs either.
    fresh = any(cluster.get("Namespace", d["metadata"]["name"]) is None for d in namespaces)
    change = Change(Effect.CREATE)
    for document in ordered:
        live = None if fresh else _live(cluster, document)
        wanted = document if fresh else _apply(cluster, document, dry_run=True)
        if document is service:
            change = classify(live, wanted, _running(cluster, live))
        elif live is None:
            say(f"{_title(document)}: is created")
        else:
            for difference in object_differences(live, wanted):
                say(f"{_title(document)}: {difference}")
    say(f"{_title(service)}: {change.effect.value}")
    for reason in change.reasons:
        say(f"  {reason}")
    for advice in change.advice:
        say(f"  note: {advice}")
    if change.effect is Effect.NEW_CLUSTER and not allow_new_cluster and not dry_run:
        raise InvalidRequest(
            "this would start a second cluster, which needs as many cards again. Nothing was applied. If that is meant: --allow-new-cluster",
            field="allow_new_cluster",
        )
    if not dry_run:
        for document in ordered:
            _apply(cluster, document)
            say(f"applied {_title(document)}")
    return change


def _title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def _live(cluster: Cluster, document: Document) -> Document | None:
    metadata = mapping(document, "metadata")
    return cluster.get(document["kind"], metadata["name"], document["apiVersion"], namespace=metadata.get("namespace"))


def _running(cluster: Cluster, service: Document | None) -> Document | None:
    """The RayCluster that the operator compares a RayService with: the one about to serve, else the one that does."""
    for role in ("pendingServiceStatus", "activeServiceStatus"):
        name = mapping(service, "status", role).get("rayClusterName")
        if name and (found := cluster.get("RayCluster", str(name), RAY)):
            return found
    return None


def _apply(cluster: Cluster, document: Document, *, dry_run: bool = False) -> Document:
    try:
        return cluster.apply(document, dry_run=dry_run)
    except InvalidRequest as error:
        if document["kind"] == "Job" and "immutable" in error.message:
            raise InvalidRequest(
                f"{error.message}. A Job cannot be changed; delete it first: "
                f"kubectl --namespace {cluster.namespace} delete job {document['metadata']['name']}",
                field="manifests",
            ) from error
        raise
