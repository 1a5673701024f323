"""The argument group Training: TRL's `SFTConfig`, which extends the Trainer's arguments, with FastChat's fields and defaults.

Importing this module imports TRL, transformers and torch. Creating an object looks for devices and registers the DeepSpeed
config with transformers. So only functions import this module, and `build.py` creates the object after the process group.

These defaults differ from TRL's: FastChat's (`optim`, `model_max_length`), `output_dir`, `deepspeed`, those for the log of
a job on many ranks (`log_level_replica`, `log_on_each_node`, `logging_nan_inf_filter`), and those for prepared data
(`dataset_kwargs`, `remove_unused_columns`). `save_strategy` stays "steps" with 500 `save_steps`, as in FastChat and the
Trainer, so that a run that dies keeps its last checkpoint.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.training_args import OptimizerNames
from trl import SFTConfig


@dataclass
class TrainingArguments(SFTConfig):
    """Options of the training. `max_length`, TRL's name, always equals `model_max_length`."""

    output_dir: str = field(
        default="output", metadata={"help": "Folder for checkpoints during training, and for the finished model."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the output of an earlier run in --output_dir; its checkpoints are removed."},
    )
    model_max_length: int = field(
        default=512, metadata={"help": "The longest sequence in tokens; longer samples are truncated, and counted in the log."}
    )
    optim: OptimizerNames | str = field(
        default="adamw_torch", metadata={"help": "The optimizer, unless the DeepSpeed config has one."}
    )
    deepspeed: dict[str, Any] | str = field(
        default="zero3",
        metadata={"help": "A DeepSpeed config with ZeRO stage 3: a shipped name, the path of a JSON file, or JSON text."},
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder to resume from; True: the newest complete one in --output_dir; auto: the same, or a "
            "start from the beginning if there is none."
        },
    )
    checkpoint_format: Literal["deepspeed", "sharded"] = field(
        default="sharded",
        metadata={
            "help": "The files of checkpoint-*. sharded: a model folder with the optimizer's state, for any number of ranks; "
            "deepspeed: DeepSpeed's own, for as many ranks as wrote them."
        },
    )
    save_async: Literal["auto"] | bool = field(
        default="auto",
        metadata={
            "help": "Copy what a sharded checkpoint holds to host memory, and train on while it is written: True, False, or "
            "auto: if the copies take at most half of the free memory."
        },
    )
    local_save_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder on a disk of each node: the copy of --save_async is made there instead of in memory, and "
            "training goes on while --output_dir receives it."
        },
    )
    save_on_each_node: bool = field(
        default=False,
        metadata={
            "help": "Where the nodes share no --output_dir: let each node keep its ranks' part of a checkpoint; rank 0 writes "
            "the model at the end."
        },
    )
    on_save_error: Literal["continue", "raise"] = field(
        default="continue",
        metadata={"help": "After two attempts to write a checkpoint: log the error and train on, or end the run with it."},
    )
    max_time: str | None = field(
        default=None,
        metadata={
            "help": "The longest time from the program's start, as SLURM writes it (3:50:00). Before it is over, the run saves "
            "a checkpoint and ends with status 75."
        },
    )
    on_nan: Literal["stop", "skip", "rollback"] = field(
        default="stop",
        metadata={
            "help": "After a loss or gradient that is not finite, which the optimizer leaves out: end the run, train on, or go "
            "back to the newest checkpoint's weights and train on."
        },
    )
    spike_factor: float = field(
        default=2.0,
        metadata={
            "help": "Warn, with the samples, of a loss above this many times the median of the last 50 logged; 0: never."
        },
    )
    step_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which a step is taken to be stuck, and the run ends; by default ten times the median step, "
            "at least 120. 0: never."
        },
    )
    stage_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which a rank that neither reads, writes nor computes is taken to be stuck, outside steps, "
            "and the run ends; by default 1,800. 0: never."
        },
    )
    simulate_fault: str | None = field(
        default=None,
        metadata={
            "help": "Let a rank fail on purpose, to try a cluster: kill:rank=1,step=5; also hang, nan, oom, slow, disk_full "
            "and preempt."
        },
    )
    unfreeze: str | None = field(
        default=None,
        metadata={
            "help": "Train only the parameters whose names this regular expression fits in any place: 'layers\\.(3[0-9])\\.'."
        },
    )
    learning_rates: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Learning rates of parameters by regular expressions of their names, the first that fits: "
            "'{\"embed_tokens\": 1e-6}'. Others have --learning_rate; the schedule scales both."
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each sequence (Ulysses), so that longer ones fit: of 8 ranks, with 4, two groups read "
            "different batches."
        },
    )
    tiled_mlp: int | None = field(
        default=None,
        metadata={
            "help": "Compute the MLPs this number of tokens at a time, twice in each pass: needs less memory for long rows."
        },
    )
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Services that receive the metrics: none, all, or names such as wandb, tensorboard."}
    )
    activation_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute most activations in the backward pass: needs less memory, and is slower by a fifth."},
    )
    log_level_replica: str = field(
        default="error", metadata={"help": "The log level of ranks other than 0; rank 0 logs for all."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the previous loss instead of nan or inf. Off: divergence is visible."}
    )
    log_on_each_node: bool = field(
        default=False, metadata={"help": "Let the first rank of every node print the metrics, not only rank 0."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator selects the columns it needs."})
    dataset_kwargs: dict[str, Any] | str | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "The data is already prepared."}
    )

    @property
    def data_ranks(self) -> int:
        """The number of ranks, or of groups of ranks, that read different batches."""
        return self.world_size // self.sequence_parallel_size

    def __post_init__(self) -> None:
        """Set TRL's name for the length. The parent classes look for devices and register the DeepSpeed config."""
        self.max_length = self.model_max_length
        super().__post_init__()
