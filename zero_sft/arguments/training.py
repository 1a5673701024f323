"""The training group: TRL's `SFTConfig`, and through it the Trainer's arguments, with FastChat's own fields and defaults.

Importing this module imports TRL, transformers and torch; making an object looks for devices and registers the DeepSpeed
config with transformers. So only functions import it, and `build.py` makes the object when its time has come.

Other defaults than TRL's: those of FastChat (`optim`, `model_max_length`), `output_dir`, `deepspeed`, and
what the way data reaches the trainer asks for (`dataset_kwargs`, `remove_unused_columns`). `save_strategy` stays "steps"
with 500 `save_steps`, FastChat's as well as the Trainer's: a run that dies keeps its last checkpoint.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig


@dataclass
class TrainingArguments(SFTConfig):
    """How to train. `max_length`, the name that TRL knows, always equals `model_max_length`."""

    output_dir: str = field(
        default="output", metadata={"help": "Where checkpoints go while training, and the finished model at the end."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace what another run has left in --output_dir; its checkpoints are removed."},
    )
    model_max_length: int = field(
        default=512, metadata={"help": "The longest sequence in tokens; what is longer is cut off, and counted in the log."}
    )
    optim: OptimizerNames | str = field(
        default="adamw_torch", metadata={"help": "The optimizer, where the DeepSpeed config has none of its own."}
    )
    deepspeed: dict[str, Any] | str = field(
        default="zero3",
        metadata={
            "help": "A DeepSpeed config of ZeRO stage 3: a shipped name, the path of a JSON file, or the config as JSON."
        },
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None, metadata={"help": "A checkpoint's folder to go on from, or True for the last one in --output_dir."}
    )
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Where the curves go: none, all, or names such as wandb, tensorboard."}
    )
    activation_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Keep few activations and compute them again in the backward pass: less memory, slower by a fifth."},
    )
    log_level_replica: str = field(
        default="error", metadata={"help": "What the ranks other than 0 say; rank 0 speaks for all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a loss of nan or inf as the one before. Off: a run that diverges shows it."}
    )
    log_on_each_node: bool = field(
        default=False, metadata={"help": "Let the first rank of every node print the metrics, not only rank 0."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes the columns it needs."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "The data comes prepared."}
    )

    def __post_init__(self) -> None:
        """Give TRL its name for the length. Looks for devices and registers the DeepSpeed config, as the parents do."""
        self.max_length = self.model_max_length
        super().__post_init__()
