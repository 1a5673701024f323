"""What ships with the estimate: configs of published models, and kinds of storage. Standard library alone."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from zero_sft.errors import ArgumentError

MODELS = Path(__file__).parent / "models"
"""Configs of published models, by name."""


def shipped_models() -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A kind of storage: GB/s (10^9 bytes) that one node gets, GB/s of the whole (0: no limit), milliseconds a request."""

    node_gb_s: float = field(metadata={"least": 1e-6})
    cluster_gb_s: float = field(default=0.0, metadata={"least": 0.0})
    request_ms: float = field(default=0.0, metadata={"least": 0.0})


STORAGES = {
    "memory": Storage(node_gb_s=20.0, request_ms=0.01),
    "nvme": Storage(node_gb_s=6.0, request_ms=0.1),
    "lustre": Storage(node_gb_s=5.0, cluster_gb_s=100.0, request_ms=1.0),
    "nfs": Storage(node_gb_s=1.0, cluster_gb_s=2.5, request_ms=1.5),
}
"""Round figures for: the page cache, a local disk with the checkpoint on it, a parallel file system, one file server."""


def storage(text: str) -> Storage:
    """A named storage, or one with figures of its own: "nvme", "lustre,cluster_gb_s=40", "node_gb_s=3,request_ms=2".

    Raises:
        ArgumentError: an unknown name or key, or a figure that is none.
    """
    name, *rest = [each.strip() for each in text.split(",")]
    if "=" in name:
        name, rest = "nvme", [name, *rest]
    if name not in STORAGES:
        raise ArgumentError(f"unknown storage {name!r}; known: {', '.join(STORAGES)}", code="estimate.unknown_storage")
    least = {each.name: each.metadata["least"] for each in fields(Storage)}
    changes = {}
    for each in rest:
        key, _, value = each.partition("=")
        try:
            changes[key] = float(value)
            good = changes[key] >= least[key]
        except (ValueError, KeyError):
            good = False
        if not good:
            raise ArgumentError(
                f"storage {each!r}: expected one of {', '.join(least)} and a figure, as in node_gb_s=3",
                code="estimate.bad_storage_figure",
            )
    return replace(STORAGES[name], **changes)
