"""Shipped data of the estimate: configs of published models, and profiles of storage. Needs only the standard library."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from zero_sft.errors import ArgumentError

MODELS = Path(__file__).parent / "models"
"""Folder with the configs of published models, one `NAME.json` each."""


def shipped_models() -> list[str]:
    """Return the names of the configs that ship with the package."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageProfile:
    """Storage profile: GB/s (10^9 bytes) of one node, GB/s of the whole storage (0: unlimited), milliseconds per request."""

    node_gb_s: float = field(metadata={"least": 1e-6})
    cluster_gb_s: float = field(default=0.0, metadata={"least": 0.0})
    request_ms: float = field(default=0.0, metadata={"least": 0.0})


STORAGES = {
    "memory": StorageProfile(node_gb_s=20.0, request_ms=0.01),
    "nvme": StorageProfile(node_gb_s=6.0, request_ms=0.1),
    "lustre": StorageProfile(node_gb_s=5.0, cluster_gb_s=100.0, request_ms=1.0),
    "nfs": StorageProfile(node_gb_s=1.0, cluster_gb_s=2.5, request_ms=1.5),
}
"""Approximate figures for the page cache, a local disk, a parallel file system and a single file server."""


def parse_storage(text: str) -> StorageProfile:
    """Parse a storage profile: "nvme", "lustre,cluster_gb_s=40" or "node_gb_s=3,request_ms=2".

    Raises:
        ArgumentError: a name or key is unknown, or a figure is not a valid number.
    """
    name, *settings = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, settings = "nvme", [name, *settings]
    if name not in STORAGES:
        raise ArgumentError(f"unknown storage {name!r}; known: {', '.join(STORAGES)}", code="estimate.unknown_storage")
    least = {field.name: field.metadata["least"] for field in fields(StorageProfile)}
    changes = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        try:
            changes[key] = float(value)
            is_valid = changes[key] >= least[key]
        except (ValueError, KeyError):
            is_valid = False
        if not is_valid:
            raise ArgumentError(
                f"storage {setting!r}: expected one of {', '.join(least)} and a figure, as in node_gb_s=3",
                code="estimate.bad_storage_figure",
            )
    return replace(STORAGES[name], **changes)
