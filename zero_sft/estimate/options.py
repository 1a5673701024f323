"""Options that only the estimate has, not the training job. Imports nothing heavy."""

from dataclasses import dataclass, field

from zero_sft.estimate.storage_profiles import STORAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateArguments:
    """Options of the cluster and of the output."""

    world_size: list[int] = field(metadata={"help": "Total number of GPUs; several numbers give several estimates."})
    ranks_per_node: int = field(default=8, metadata={"help": "GPUs per node."})
    gpu_memory_gib: float = field(default=80.0, metadata={"help": "Memory of each GPU in GiB."})
    host_memory_gib: float = field(default=1024.0, metadata={"help": "Host memory of each node in GiB."})
    storage: str = field(
        default="lustre",
        metadata={"help": f"{', '.join(STORAGES)}; or your own figures: lustre,node_gb_s=10,request_ms=0.5"},
    )
    plot: str | None = field(default=None, metadata={"help": "File for a plot of one model with one world size."})
    markdown: str | None = field(default=None, metadata={"help": "Markdown file for the results."})
    json: bool = field(default=False, metadata={"help": "Print the results as JSON."})
