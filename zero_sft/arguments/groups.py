"""The argument groups Model and Data. Names and defaults follow FastChat where it has them.

The third group, Training, extends TRL's `SFTConfig` (see `training.py`). That module imports TRL; this one imports nothing
heavy.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from zero_sft.data.samples.sample_formats import DataFormat
from zero_sft.hub.options import HubOptions
from zero_sft.loading.options import LoadOptions
from zero_sft.packaged_file import packaged_file

SAMPLE_CONVERSATIONS = "conversations.json"


@dataclass(frozen=True, kw_only=True)
class _ModelName:
    """The model name, in a base class so that `--help` shows it first."""

    model_name_or_path: str = field(
        default="facebook/opt-125m", metadata={"help": "The model to fine-tune: a local folder or a hub id."}
    )


@dataclass(frozen=True, kw_only=True)
class ModelArguments(LoadOptions, HubOptions, _ModelName):
    """Options of the model: its source, the loader, the tokenizer and the config."""

    def __post_init__(self) -> None:
        """Check the options of each parent."""
        LoadOptions.__post_init__(self)
        HubOptions.__post_init__(self)

    padding_side: Literal["right", "left"] = field(
        default="right",
        metadata={"help": "The tokenizer's padding side, which the export keeps; training always pads on the right."},
    )
    add_tokens: list[str] | None = field(
        default=None, metadata={"help": "Tokens to add to the tokenizer; the embedding gets rows for them."}
    )
    add_special_tokens: list[str] | None = field(
        default=None, metadata={"help": "The same, of tokens that a decoded text leaves out, such as marks of turns."}
    )
    resize_vocab: bool = field(
        default=False, metadata={"help": "Give the embedding rows for all tokens of the tokenizer, if it has too few."}
    )
    rope_parameters: dict[str, Any] | None = field(
        default=None,
        metadata={"help": 'RoPE scaling as JSON: \'{"rope_type": "yarn", "factor": 4.0}\'. Overrides the automatic scaling.'},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArguments:
    """Options of the data: its sources, and their conversion to tokens."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "JSON, JSONL, Parquet, CSV, or a folder of these; several: a.json:0.7,b:0.3. Default: the shipped samples."
        },
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Samples to evaluate on (--eval_strategy); several sets as chat=a.json,tide=b.json."}
    )
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenise each sample when it is needed, instead of all at the start."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Tokenise samples while the model is trained, without storing them; needs --max_steps."},
    )
    data_format: DataFormat | None = field(
        default=None, metadata={"help": "The format of all samples; by default, it is detected for each sample."}
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "Names of the data's columns, such as prompt=question,completion=answer or messages=chat.turns."},
    )
    tools: Literal["render", "ignore"] = field(
        default="render", metadata={"help": "Give a sample's tools to the chat template, or ignore them: its texts have them."}
    )
    reasoning: Literal["field", "inline", "drop"] = field(
        default="field",
        metadata={"help": "Thoughts in a field: give them to the template, write them into the text, or drop them."},
    )
    merge_turns: bool = field(
        default=False, metadata={"help": "Join consecutive turns of the same speaker, instead of refusing the sample."}
    )
    train_on: Literal["all", "last"] = field(
        default="all", metadata={"help": "The answers of a conversation that count in the loss."}
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Reaction to an unusable sample: stop the run, or skip the sample and report it."}
    )
    overlong: Literal["truncate", "split", "drop"] = field(
        default="truncate",
        metadata={"help": "Samples longer than model_max_length: truncate at the end, split between rounds, or drop."},
    )
    packing: bool | None = field(
        default=None,
        metadata={"help": "Pack samples into rows; by default if the model keeps them apart. False: FastChat's batches."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare the data; by default one per core, at most 16."}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for prepared data, preferably shared by all nodes; by default below HF_DATASETS_CACHE."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "vicuna, chatml, llama3, hermes (has tools), model or a Jinja file; by default the model's, else vicuna."
        },
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={"help": "A file of prompts (a JSON list, or one per line) that the model answers before and after training."},
    )
    sample_every: int = field(
        default=0, metadata={"help": "Answer --sample_prompts after every N steps as well; 0: not while the model is trained."}
    )

    @property
    def training_path(self) -> str:
        """`data_path`, or by default the path of the shipped conversations."""
        return str(packaged_file("examples", SAMPLE_CONVERSATIONS)) if self.data_path is None else self.data_path
