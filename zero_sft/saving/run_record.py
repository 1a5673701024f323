"""Record the settings of a run in each of its checkpoints, so that a run that can't resume from one fails at its start.

DeepSpeed and the Trainer don't compare settings. With another model, optimizer or schedule, a resumed run ends in a traceback
after the weights were read, or trains with a learning rate of 0. With other data it continues silently and skips the first
batches. Left out: shapes that no size in the config determines; DeepSpeed checks those.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from zero_sft.ds_config import ADAMW_OPTIMS
from zero_sft.errors import ArgumentError
from zero_sft.printable import excerpt, first_of

logger = logging.getLogger(__name__)

RECORD_FILE = "zero_sft_run.json"

ADAMW = "adamw"
"""The record's name of every Adam and AdamW optimizer, since their states have one format."""

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "ffn_dim", "d_model",
)  # fmt: skip
_NOT_COMPARED = re.compile(
    r"_.*|.*_token_id|output_.*|(torch_)?dtype|use_cache|architectures|auto_map|id2label|label2id|problem_type|return_dict"
    r"|initializer_range|quantization_config|transformers_version"
)
"""Keys of a model's config that neither a training step nor an export's values depend on."""
_CHANGEABLE = re.compile(r"rope_.*|max_position_embeddings|.*(dropout|drop|pdrop|coef|jitter|noise).*")
"""Keys of a model's config that users change between runs: for other lengths, and for the training alone."""
_SETTINGS = ("model_max_length", "seed", "data_seed", "weight_decay", "unfreeze", "learning_rates")
_STATEFUL_SCHEDULES = frozenset({"reduce_lr_on_plateau", "greedy"})
"""Schedules whose state is more than a step counter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The settings of a run on which its checkpoints depend. The fields have the same names in the file.

    A number is 0 if it is unknown, as in records of earlier releases.

    Attributes:
        model_type: the text model's type.
        sizes: sizes in the text model's config, by name.
        config: the text model's config, apart from its sizes and what training does not depend on; empty in earlier releases.
        optimizer, schedule: names.
        from_ds_config: whether DeepSpeed makes the schedule, from its config's `scheduler` section.
        learning_rate: the base rate.
        max_steps: the step at which the run ends.
        samples_a_step: samples per optimizer step over all ranks; with packing, packed rows.
        steps_an_epoch: optimizer steps of a whole epoch.
        settings: training arguments that change the steps, by name.
        adapter: the settings of the adapters that are trained; empty if the model is, as in records of earlier releases.
        rows, tokens: size of the training data; no tokens are counted if they are made lazily.
        order_samples: samples per step by which samples are grouped by length: the order of an epoch depends on it.
        model, data: the names of the base model and of the data's sources, for the model's card; not compared.
    """

    model_type: str
    sizes: Mapping[str, int]
    optimizer: str
    schedule: str
    from_ds_config: bool
    learning_rate: float = 0.0
    max_steps: int = 0
    samples_a_step: int = 0
    steps_an_epoch: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    order_samples: int = 0
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    adapter: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model: str = ""
    data: Sequence[str] = field(default_factory=list[str])

    @classmethod
    def of(cls, text_config: Any, arguments: Any, adapter: Mapping[str, Any]) -> "RunRecord":
        """Make the record of a run from the text model's config, the Trainer's arguments and the adapters' settings."""
        config = arguments.hf_deepspeed_config.config
        scheduler = config.get("scheduler") or {}
        optimizer = str((config.get("optimizer") or {}).get("type") or arguments.optim.value).lower()
        sizes = {name: getattr(text_config, name, None) for name in _SIZES}
        return cls(
            model_type=text_config.model_type,
            sizes={name: size for name, size in sizes.items() if type(size) is int},
            optimizer=ADAMW if optimizer in {"adam", "adamw", *ADAMW_OPTIMS} else optimizer,
            schedule=str(scheduler.get("type") or arguments.lr_scheduler_type.value),
            from_ds_config=bool(scheduler),
            config=_comparable(text_config),
            adapter=adapter,
            learning_rate=arguments.learning_rate,
            samples_a_step=arguments.data_ranks * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
            settings={name: getattr(arguments, name) for name in _SETTINGS},
        )


_RECORD = pydantic.TypeAdapter(RunRecord)


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record into a checkpoint's folder. Rank 0."""
    (folder / RECORD_FILE).write_bytes(record_json(record))


def record_json(record: RunRecord) -> bytes:
    """Return the contents of the record's file."""
    return (json.dumps(asdict(record), indent=2) + "\n").encode()


def read_record(folder: Path) -> RunRecord | None:
    """Return the record in a checkpoint's folder; None without one, as in checkpoints of earlier releases.

    A record that can't be read is None as well, with a warning.
    """
    try:
        return _RECORD.validate_json((folder / RECORD_FILE).read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(
            "%s can't be read (%s): this run's settings and data are not compared with those of the checkpoint",
            folder / RECORD_FILE, excerpt(error),
        )  # fmt: skip
        return None


def _comparable(text_config: Any) -> dict[str, Any]:
    """Return the part of a config that is compared, as JSON holds it."""
    values = {
        key: value for key, value in text_config.to_dict().items() if key not in _SIZES and not _NOT_COMPARED.fullmatch(key)
    }
    return json.loads(json.dumps(values, default=str))


def require_same_run(folder: Path, now: RunRecord, *, at_same_sample: bool = False) -> None:
    """Raise if a run can't resume from the checkpoint in `folder`; warn about settings that differ. Rank 0.

    Args:
        at_same_sample: the run goes on at the same sample, even if a step has another number of samples.

    Raises:
        ArgumentError: the model, the optimizer or the kind of schedule differs from the checkpoint's.
    """
    then = read_record(folder)
    if then is None:
        return
    _require_same_model(folder, then, now)
    _require_same_adapter(folder, then, now)
    if then.optimizer != now.optimizer:
        raise ArgumentError(
            f"--resume_from_checkpoint: {folder} is of a run with the optimizer {then.optimizer}, and this one has "
            f"{now.optimizer}. Give the same --optim, or continue from its weights with a new optimizer: export them, and name "
            "them with --model_name_or_path.",
            code="resume.other_optimizer",
        )
    stateful = {then.schedule, now.schedule} & _STATEFUL_SCHEDULES
    if then.from_ds_config != now.from_ds_config or (stateful and then.schedule != now.schedule):
        raise ArgumentError(
            f"--resume_from_checkpoint: {folder} is of a run with the learning-rate schedule {_described(then)}, and this one "
            f"has {_described(now)}, whose state has another format. Give the same --lr_scheduler_type, and a DeepSpeed config "
            "with the same scheduler section.",
            code="resume.other_schedule",
        )
    for change in _changes(then, now, at_same_sample=at_same_sample):
        logger.warning("this run differs from its checkpoint: %s", change)


def _require_same_model(folder: Path, then: RunRecord, now: RunRecord) -> None:
    sizes = [f"{name} {size} (here {now.sizes.get(name)})" for name, size in then.sizes.items() if now.sizes.get(name) != size]
    kinds = [f"model type {then.model_type} (here {now.model_type})"] if then.model_type != now.model_type else []
    values = [
        f"{key} {excerpt(was)} (here {excerpt(value)})"
        for key, was, value in _changed_config(then, now)
        if not _CHANGEABLE.fullmatch(key)
    ]
    if differences := sizes or kinds or values:
        raise ArgumentError(
            f"--resume_from_checkpoint: {folder} is of another model than --model_name_or_path names: {first_of(differences)}. "
            "Give the model with which the run was started.",
            code="resume.other_model",
        )


def _require_same_adapter(folder: Path, then: RunRecord, now: RunRecord) -> None:
    """Compare the adapters of two runs.

    Raises:
        ArgumentError: one of them trains adapters and the other does not, or these are others.
    """
    names = [name for name in then.adapter.keys() | now.adapter.keys() if then.adapter.get(name) != now.adapter.get(name)]
    if not names:
        return
    if not then.adapter or not now.adapter:
        was, remedy = ("LoRA", "give its options") if then.adapter else ("without LoRA", "leave --lora_r out")
        difference = f"{was}: {remedy}"
    else:
        values = [f"{name} {excerpt(then.adapter.get(name))} (here {excerpt(now.adapter.get(name))})" for name in sorted(names)]
        difference = f"with other adapters: {first_of(values)}. Give the same options of LoRA"
    raise ArgumentError(
        f"--resume_from_checkpoint: {folder} is of a run {difference}, or start a new run in another --output_dir.",
        code="resume.other_adapter",
    )


def _changed_config(then: RunRecord, now: RunRecord) -> list[tuple[str, Any, Any]]:
    """Return the keys of the models' configs whose values differ, with both values. Keys of one release alone are left out."""
    keys = sorted(then.config.keys() & now.config.keys())
    return [(key, then.config[key], now.config[key]) for key in keys if then.config[key] != now.config[key]]


def _changes(then: RunRecord, now: RunRecord, *, at_same_sample: bool) -> list[str]:
    """List the changed settings that may not do what a user expects, one sentence each."""
    changes = []
    if then.schedule != now.schedule:
        changes.append(f"its learning-rate schedule was {then.schedule}, and is {now.schedule} from here on")
    if then.learning_rate and then.learning_rate != now.learning_rate:
        changes.append(
            f"--learning_rate {now.learning_rate:g} has no effect, since the schedule keeps the checkpoint's rate, "
            f"{then.learning_rate:g}. For another rate, train on from the exported model with a new optimizer"
        )
    if not at_same_sample and then.samples_a_step and then.samples_a_step != now.samples_a_step:
        changes.append(
            f"a step had {then.samples_a_step:,} samples, and has {now.samples_a_step:,} from here on, so that some "
            "samples of this epoch are trained on twice or never"
        )
    changes += [
        f"the model's {key} was {excerpt(was)}, and is {excerpt(value)} from here on"
        for key, was, value in _changed_config(then, now)
    ]
    return changes + [
        f"--{name} was {then.settings[name]}, and is {value} from here on"
        for name, value in now.settings.items()
        if name in then.settings and then.settings[name] != value
    ]


def warn_of_other_data(then: RunRecord, now: RunRecord, last_step: int) -> None:
    """Warn if the training data or the number of steps differs from the checkpoint's. Rank 0.

    Args:
        last_step: the end of the checkpoint's run, in steps of this run.
    """
    if then.max_steps and last_step != now.max_steps and not now.schedule.startswith("constant"):
        logger.warning(
            "the checkpoint's run was to end at step %d%s, and this one ends at step %d: the learning-rate schedule is that of "
            "the new length, and jumps here",
            then.max_steps, f" ({last_step} in steps of this run)" * (last_step != then.max_steps), now.max_steps,
        )  # fmt: skip
    if then.rows and (then.rows, then.tokens) != (now.rows, now.tokens):
        logger.warning(
            "the training data is not the checkpoint's: %s then, %s now. The run goes on at the same step, so that the rows "
            "which come first in its order are skipped though they were not trained on.", _rows(then), _rows(now),
        )  # fmt: skip


def _rows(record: RunRecord) -> str:
    return f"{record.rows:,} rows of {record.tokens:,} tokens" if record.tokens else f"{record.rows:,} rows"


def _described(record: RunRecord) -> str:
    return f"{record.schedule} {'of the DeepSpeed config' if record.from_ds_config else 'of --lr_scheduler_type'}"
