"""Options of the estimate that the training job does not have. Imports nothing heavy."""

from dataclasses import dataclass, field

from zero_sft.estimate.storage_profiles import STORAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateArguments:
    """The cluster, and what is written."""

    world_size: list[int] = field(metadata={"help": "GPUs in all; several numbers make a table."})
    ranks_per_node: int = field(default=8, metadata={"help": "GPUs of a node."})
    gpu_memory_gib: float = field(default=80.0, metadata={"help": "Memory of a GPU, in GiB."})
    host_memory_gib: float = field(default=1024.0, metadata={"help": "Memory of a node's host, in GiB."})
    storage: str = field(
        default="lustre",
        metadata={"help": f"{', '.join(STORAGES)}; or figures of your own: lustre,node_gb_s=10,request_ms=0.5"},
    )
    plot: str | None = field(default=None, metadata={"help": "A picture to draw, of one model in one world."})
    markdown: str | None = field(default=None, metadata={"help": "A Markdown document to write the results to."})
    json: bool = field(default=False, metadata={"help": "Print the results as JSON."})
