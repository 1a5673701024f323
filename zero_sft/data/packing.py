"""Pack several samples into one row, so that little is computed on padding.

TRL's best-fit packing fills rows of `model_max_length` tokens. The position ids restart with each sample; without an attention
mask, transformers takes a restart for the border between samples that must not attend to each other. Not every model does so:
with ALiBi, with positions that the model counts itself, or with a state that runs along the row, a sample would see the
previous one. So only model types that are known to keep samples apart are packed; `tests/isolation.py` determines them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zero_sft.console import progress
from zero_sft.data.tokenize import WEIGHTS
from zero_sft.errors import ArgumentError
from zero_sft.printable import with_count

if TYPE_CHECKING:
    import datasets
    import pyarrow

PACKABLE_MODEL_TYPES = frozenset(
    """
    apertus arcee aria_text axk1 beam bitnet codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx
    deepseek_v3 diffllama dots1 emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3
    gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite
    got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4 llama4_text longcat_flash mellum mimo_v2_flash
    minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mllama modernbert-decoder moshi
    moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phi4_multimodal phimoe qwen2
    qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma whisper youtu
""".split()  # noqa: SIM905 - a table
)
"""Types of language models (transformers' `model_type`) that keep packed samples apart, except for `LEAKING_WITH_FLASH`."""

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""The attentions that rows are packed for; `tests/isolation.py` and `tests/gpu` test each of them."""

LEAKING_WITH_FLASH = frozenset(
    "cohere_compass_text ctrl fuyu gpt_bigcode gpt_neo gptj hrm_text moshi persimmon whisper".split()  # noqa: SIM905
)
"""Packable types that leak with flash attention: they don't pass it position ids, or don't support it.

Found by `tests/isolation.py` with transformers 5.23 on a CPU. It runs transformers' code, with plain torch in place of the
functions of flash-attn. The separate flash attention classes of `gpt_neo` and `gptj` were not examined.
"""

_BATCH_SAMPLES = 20_000  # samples packed together, unless they are very long
_BATCH_TOKENS = 2**28  # so that they fit into memory; Arrow's offsets into a column have 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingDecision:
    """The decision whether to pack: the `reason` not to, empty if rows are packed."""

    reason: str = ""

    @property
    def enabled(self) -> bool:
        """Whether samples are packed."""
        return not self.reason


def is_flash(attention: str | None) -> bool:
    """Whether an attention implementation is a flash attention of any version or source; None is transformers' choice."""
    return "flash" in (attention or "")


def resolve_packing(wanted: bool | None, config: Any, *, attention: str | None, lazy: bool) -> PackingDecision:
    """Decide whether to pack: as the user says, or, for None, if the model keeps samples apart. Pure.

    Args:
        wanted: the value of `--packing`.
        config: the config of the language model, which may be a part of the model's config.
        attention: the attention implementation; None for transformers' choice.

    Raises:
        ArgumentError: packing is requested but not possible.
    """
    if wanted is False:
        return PackingDecision(reason="--packing False")
    reason = _obstacle(config, attention, lazy)
    if reason and wanted:
        raise ArgumentError(
            f"--packing True: {reason}. Leave the option out, so that samples are padded to the longest of their batch.",
            code="data.packing_impossible",
        )
    return PackingDecision(reason=reason)


def packing_unless_too_few(packing: PackingDecision, wanted: bool | None, rows: int, needed: int) -> PackingDecision:
    """Disable packing if there are fewer packed `rows` than the `needed` rows of one batch, unless it is `wanted`. Pure."""
    if not packing.enabled or wanted or rows >= needed:
        return packing
    return PackingDecision(reason=f"they fill {with_count(rows, 'row')}, and one batch needs {needed}")


def _obstacle(config: Any, attention: str | None, lazy: bool) -> str:
    """Return the reason why packing is not possible; empty if it is possible."""
    if lazy:
        return "--lazy_preprocess does not know the samples' lengths at the start"
    if config.model_type not in PACKABLE_MODEL_TYPES:
        return f"models of type {config.model_type} are not known to keep packed samples apart"
    if getattr(config, "alibi", False):
        return "ALiBi does not keep packed samples apart"
    leaks = is_flash(attention) and config.model_type in LEAKING_WITH_FLASH
    if leaks or (attention is not None and attention not in ATTENTIONS):
        return f"attention {attention} is not known to keep packed samples of a {config.model_type} apart"
    return ""


def samples_packed_together(model_max_length: int) -> int:
    """Return the number of samples among which those for a row are chosen."""
    return max(1, min(_BATCH_SAMPLES, _BATCH_TOKENS // model_max_length))


def pack(dataset: "datasets.Dataset", model_max_length: int, file: str | None = None) -> "datasets.Dataset":
    """Pack samples into rows of at most `model_max_length` tokens.

    Each row has `input_ids`, `labels` and `seq_lengths`, the lengths of its samples; and `weights`, if the samples have them.
    The rows are written to `file`; None leaves the choice to `datasets`.
    """
    with progress.task("packing the samples"):
        return _pack(dataset, model_max_length, file)


def pack_table(samples: "pyarrow.Table", model_max_length: int) -> "pyarrow.Table":
    """Pack the samples of a table in memory, as `pack` does; any thread may call it."""
    import datasets

    return _pack(datasets.Dataset(samples), model_max_length, None).with_format("arrow")[:]


def _pack(dataset: "datasets.Dataset", model_max_length: int, file: str | None) -> "datasets.Dataset":
    from trl import pack_dataset

    batch_size = samples_packed_together(model_max_length)
    options = {"cache_file_name": file, "batch_size": batch_size, "load_from_cache_file": False}
    columns = [name for name in ("input_ids", "labels", WEIGHTS) if name in dataset.column_names]
    samples = dataset.select_columns(columns)
    if WEIGHTS in columns:
        samples = samples.map(_with_weights, load_from_cache_file=False)
    return pack_dataset(samples, model_max_length, "bfd", options)


def _with_weights(sample: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the weights of a sample's tokens, which are null if all weigh 1."""
    return {WEIGHTS: sample[WEIGHTS] or [1.0] * len(sample["input_ids"])}


def packed_line(samples: int, packed: "datasets.Dataset", model_max_length: int) -> str:
    """Format the number of packed rows, and the share of their tokens that is filled, for the log."""
    tokens = sum(len(chunk.values) for chunk in packed.data.column("input_ids").chunks)
    filled = tokens / (len(packed) * model_max_length)
    rows = with_count(len(packed), "row")
    return f"{with_count(samples, 'sample')} packed into {rows} of {model_max_length:,} tokens, {filled:.1%} full"


def position_ids(lengths: Sequence[int], width: int) -> list[int]:
    """Return positions that restart with each sample, and with the padding up to `width`.

    Worked example: lengths 3 and 2 in a width of 7: 0 1 2 0 1 0 1.
    """
    padding = width - sum(lengths)
    return [position for length in (*lengths, padding) for position in range(length)]
