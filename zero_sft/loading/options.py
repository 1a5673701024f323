"""Options of a load, shared by `load_model`, the command lines and the estimate. Imports nothing heavy: `--help` is fast."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from zero_sft.errors import ArgumentError
from zero_sft.options.keywords import require_types
from zero_sft.plan.plan import SCATTER_BYTES

logger = logging.getLogger(__name__)

READER_MIB = 2 * SCATTER_BYTES // 2**20
"""MiB that one reading thread holds at most: two staging buffers of `SCATTER_BYTES`, or a tile while its scales are applied."""

REMOVED_OPTIONS = {"mmap": "shards are always copied into memory of the process"}
"""Options of earlier releases that no longer have an effect, and why. They are accepted with a warning for one release."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of a load.

    Raises:
        ArgumentError: a value has another type or is out of range.
    """

    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ...; transformers chooses if it isn't given."}
    )
    dtype: str | object = field(
        default="auto",
        metadata={
            "help": "The weights' dtype; auto follows --bf16 and --fp16, or the DeepSpeed config.",
            "choices": ("auto", "bfloat16", "float16", "float32"),
        },
    )
    loader: Literal["sharded", "stock"] = field(
        default="sharded",
        metadata={"help": "sharded: every rank reads only its bytes. stock: transformers' loader, the fallback."},
    )
    strict: bool = field(default=False, metadata={"help": "A missing or unexpected weight is an error."})
    verify: bool = field(
        default=False, metadata={"help": "Read the files again by independent code, and compare hashes with every shard."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Initialise weights whose stored shape differs from the model's, instead of an error."}
    )
    buffer_mib: int = field(
        default=64, metadata={"help": f"MiB that the load may hold next to its shards: {READER_MIB} for each reading thread."}
    )

    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Store the weights of linear modules in 4 bits (QLoRA, with bitsandbytes), sharded; needs LoRA."},
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "The numbers that 4 bits stand for."})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales of the 4-bit weights as well: 4.13 bits a weight instead of 4.5."}
    )

    def __post_init__(self) -> None:
        require_types(self, LoadOptions)
        for name, value, default in (("loader", "stock", "sharded"), ("verify", True, False)):
            if self.load_in_4bit and getattr(self, name) == value:
                raise ArgumentError(
                    f"load_in_4bit can't be used with {name}={value!r}: leave one of the two out (the default of {name} is "
                    f"{default!r})",
                    code="arguments.contradiction",
                )
        if self.buffer_mib < READER_MIB:
            raise ArgumentError(
                f"buffer_mib must be a whole number, at least {READER_MIB}; got {self.buffer_mib!r}",
                code="arguments.wrong_value",
            )

    def to_match(self) -> dict[str, object]:
        """Return the options that must be equal on all ranks. A node with less memory may have a smaller buffer."""
        names = (
            "attn_implementation", "loader", "strict", "verify", "ignore_mismatched_sizes",
            "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        )  # fmt: skip
        return {"dtype": str(self.dtype).removeprefix("torch."), **{name: getattr(self, name) for name in names}}

    def reading_threads(self, cpu_cores: int) -> int:
        """Return the number of threads that read at the same time."""
        return max(1, min(self.buffer_mib // READER_MIB, cpu_cores))


def without_removed_options(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments without removed options, and log a warning for each of these."""
    for name in keywords.keys() & REMOVED_OPTIONS.keys():
        logger.warning("%s has no effect any more: %s. Leave it out.", name, REMOVED_OPTIONS[name])
    return {name: value for name, value in keywords.items() if name not in REMOVED_OPTIONS}
