"""What the model and the data groups of arguments hold. The names and defaults are FastChat's, where FastChat has them.

The third group, training, is TRL's `SFTConfig` with a few fields of its own: see `training.py`, which needs TRL to be imported;
this module needs nothing heavy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from zero_sft.hub.options import HubOptions
from zero_sft.loading.options import LoadOptions
from zero_sft.shipped import shipped

SAMPLE_CONVERSATIONS = "conversations.json"


@dataclass(frozen=True, kw_only=True)
class _ModelName:
    """The first option of the group, for the order in `--help`."""

    model_name_or_path: str = field(
        default="facebook/opt-125m", metadata={"help": "The model to start from: a local folder or a hub id."}
    )


@dataclass(frozen=True, kw_only=True)
class ModelArguments(LoadOptions, HubOptions, _ModelName):
    """Which model, from where, and how it is loaded: the options of the loader, and those of the tokenizer and config."""

    def __post_init__(self) -> None:
        """Check the options of each parent."""
        LoadOptions.__post_init__(self)
        HubOptions.__post_init__(self)

    padding_side: Literal["right", "left"] = field(
        default="right",
        metadata={"help": "The tokenizer's side of padding, in the exported model too; training pads at the right."},
    )
    rope_parameters: dict[str, Any] | None = field(
        default=None,
        metadata={"help": 'How to scale RoPE, as JSON: \'{"rope_type": "yarn", "factor": 4.0}\'. Wins over the automatic way.'},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArguments:
    """Which conversations, and how they become tokens."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "JSON, JSONL, Parquet or a folder of them, several as a.json:0.7,b:0.3; by default the shipped samples."
        },
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Samples to evaluate on, for --eval_strategy; none by default."}
    )
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenise a sample when it is needed, instead of all of them at the start."}
    )
    data_format: Literal["sharegpt", "messages", "alpaca", "prompt_completion", "text"] | None = field(
        default=None, metadata={"help": "The layout of every sample; found out by default, sample by sample."}
    )
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "Which answers of a conversation go into the loss."}
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "What a sample that can't be used does: end the run, or be left out and reported."}
    )
    overlong: Literal["truncate", "split", "drop"] = field(
        default="truncate",
        metadata={"help": "Samples longer than model_max_length: cut at the end, split between rounds, or dropped."},
    )
    packing: bool | None = field(
        default=None,
        metadata={"help": "Several samples in a row; by default where the model keeps them apart. False: FastChat's batches."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare the data; by default one a core, 16 at most."}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where prepared data is kept, best seen by all nodes; by default below HF_DATASETS_CACHE."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "vicuna, chatml, llama3, model or a Jinja file; by default the model's own if it has one, else vicuna."
        },
    )

    sample_prompts: str | None = field(
        default=None,
        metadata={"help": "A file of prompts, a JSON list or one a line, answered before and after the training."},
    )

    @property
    def training_path(self) -> str:
        """`data_path`, or the shipped sample conversations."""
        return str(shipped("examples", SAMPLE_CONVERSATIONS)) if self.data_path is None else self.data_path
