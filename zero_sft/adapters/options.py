"""Options of adapters, with the names of FastChat's `train_lora.py` and of TRL. Imports nothing heavy: `--help` is fast."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from zero_sft.errors import ArgumentError

DROPOUT = 0.05
"""FastChat's and TRL's default."""

_SWITCHES = ("lora_r", "lora_weight_path")
"""Each of these options turns adapters on."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of LoRA; without `lora_r` and `lora_weight_path`, all parameters are trained."""

    lora_r: int | None = field(
        default=None,
        metadata={"help": "Train adapters of this rank (LoRA), and freeze the model. By default, train the model."},
    )
    lora_alpha: int = field(default=16, metadata={"help": "The adapters' products are scaled by lora_alpha / lora_r."})
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": f"Dropout before the adapters; by default {DROPOUT}, and 0 with --lora_target_parameters."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: the last parts of their names, one regular expression, or all-linear. By "
            "default PEFT's choice for the model's type: q_proj and v_proj for Llama."
        },
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters that get an adapter, such as experts: mlp.experts.gate_up_proj mlp.experts.down_proj."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained as a whole and saved with the adapter, such as embed_tokens."}
    )
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "The base model's biases that are trained as well."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Train the magnitude of each output apart from its direction (DoRA)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead (rsLoRA)."})
    lora_weight_path: str | None = field(
        default=None, metadata={"help": "Train on from this adapter (PEFT), a local folder; its config has all settings."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "At the end write the model with the adapter merged into it; the adapter is in its folder adapter."},
    )

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.lora_r is not None or self.lora_weight_path is not None

    @property
    def dropout(self) -> float:
        """The dropout before the adapters."""
        if self.lora_dropout is not None:
            return self.lora_dropout
        return 0.0 if self.lora_target_parameters else DROPOUT


NAMES = tuple(each.name for each in fields(LoraOptions))


def unusable_lora_options(values: Mapping[str, Any]) -> Iterator[ArgumentError]:
    """Yield an error for each combination of given options, and each value, that can't be used. Pure.

    Args:
        values: the values that the user gave, by name of any option.
    """
    given = [name for name in NAMES if values.get(name) is not None]
    has_rank, has_path = (values.get(name) is not None for name in _SWITCHES)
    others = [name for name in given if name not in _SWITCHES and values[name] is not False]
    if others and not (has_rank or has_path):
        yield ArgumentError(
            f"--{others[0]} does nothing without adapters: give --lora_r, or leave it out", code="arguments.no_effect"
        )
    in_adapter = [name for name in ("lora_r", *others) if name in given and name not in ("merge_adapter", "lora_weight_path")]
    if has_path and in_adapter:
        yield ArgumentError(
            f"--{in_adapter[0]} is in the config of the adapter that --lora_weight_path names: leave one of the two out",
            code="arguments.contradiction",
        )
    for name in ("lora_r", "lora_alpha"):
        if name in given and values[name] < 1:
            yield ArgumentError(f"--{name} must be more than 0; got {values[name]}", code="arguments.out_of_range")
    dropout = values.get("lora_dropout")
    if dropout is not None and not 0 <= dropout < 1:
        yield ArgumentError(f"--lora_dropout must be at least 0 and below 1; got {dropout:g}", code="arguments.out_of_range")
    yield from _unusable_with_parameters(values, dropout)
    yield from unusable_in_4_bits(values, adapters=has_rank or has_path)
    if (has_rank or has_path) and values.get("checkpoint_format") == "deepspeed":
        yield ArgumentError(
            "--checkpoint_format deepspeed would hold the frozen model in each checkpoint: leave it out with --lora_r",
            code="arguments.needs_sharded_checkpoints",
        )


def unusable_in_4_bits(values: Mapping[str, Any], *, adapters: bool) -> Iterator[ArgumentError]:
    """Yield an error for each option that weights in 4 bits exclude: they are never trained, and nothing is added to them."""
    if not values.get("load_in_4bit"):
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if values.get(name) is not None:
                yield ArgumentError(f"--{name} does nothing without --load_in_4bit True", code="arguments.no_effect")
        return
    if not adapters:
        yield ArgumentError(
            "--load_in_4bit freezes the weights that it quantises: give --lora_r to train adapters", code="arguments.no_effect"
        )
    for name, remedy in (
        ("merge_adapter", "leave it out, and merge into the unquantised weights: python -m zero_sft.export --adapter"),
        ("use_dora", "leave one of the two out: DoRA needs the lengths of the weights' rows"),
    ):
        if values.get(name):
            yield ArgumentError(f"--{name} can't be used with --load_in_4bit: {remedy}", code="arguments.contradiction")


def _unusable_with_parameters(values: Mapping[str, Any], dropout: float | None) -> Iterator[ArgumentError]:
    """PEFT adds an adapter to a parameter itself, not to what a module computes with it."""
    if not values.get("lora_target_parameters"):
        return
    for name, value in (("lora_dropout", dropout), ("use_dora", values.get("use_dora"))):
        if value and not math.isclose(float(value), 0.0):
            yield ArgumentError(
                f"--{name} can't be used with --lora_target_parameters: leave one of the two out",
                code="arguments.contradiction",
            )
