"""Find the models that keep packed samples apart: `python -m tests.isolation [type ...]`, by default all causal LM types.

A tiny fp32 model of the type, in training mode without dropout, computes each sample alone, and all samples packed by the job's
collator. If its logits differ by more than rounding, a sample has seen another one.
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests import architectures
from tests.attentions import FLASH, FLEX, give, kernels_of
from zero_sft.data import packing
from zero_sft.data.collator import Collator

TOLERANCE = 1e-4
SEEDS = 3
LENGTHS = ((9, 14, 6), (7, 11))
ATTENTIONS = tuple(name for name in packing.ATTENTIONS if name != "flash_attention_3")
"""The attentions that rows are packed for. The third flash attention gets its arguments from the second one's code; with its
own kernels it runs in tests/gpu."""


@torch.no_grad()
def leak(model: torch.nn.Module, vocabulary: int = 60) -> float:
    """Return the largest difference between a logit of packed and of separate samples, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]
    flat = [[token for sample in row for token in sample] for row in rows]
    packed = [
        {"input_ids": ids, "labels": ids, "seq_lengths": list(map(len, row))} for ids, row in zip(flat, rows, strict=True)
    ]
    is_flat = packing.is_flash(model.config._attn_implementation)
    batch = Collator(pad_token_id=0, flat=is_flat)(packed)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    if is_flat:
        logits = torch.split(logits[0], list(map(len, flat)))
    worst = 0.0
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            ids = torch.tensor([sample])
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            found = logits[number][start : start + len(sample)]
            start += len(sample)
            worst = max(worst, ((found - alone).abs().max() / alone.abs().max()).item())
    return worst


def verdict(model_type: str, attentions: Sequence[str] = ATTENTIONS) -> str:
    """Return "" if a tiny model of this type keeps packed samples apart with all `attentions` it supports, else the reason."""
    tried = 0
    for attention in attentions:
        try:
            found = min(_leaks(model_type, attention), default=None)
        except (ValueError, ImportError) as error:
            # The model lacks this attention, or has attention sinks, with which flex attention runs only on a GPU.
            if "attention implementation" in str(error) or "cannot be run on CPU" in str(error):
                continue
            raise
        if found is None:
            continue
        tried += 1
        if not found < TOLERANCE:
            return f"{attention}: {found:.2g}"
    return "" if tried else "none of the attentions"


def _leaks(model_type: str, attention: str) -> Iterator[float]:
    """Yield `leak` of random models until there is none. Rounding may change a choice of experts, but a real leak remains."""
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        config = architectures.tiny_config(model_type)
        _without_chance(config)
        built = "eager" if attention in (FLASH, FLEX) else attention
        kinds = {"attn_implementation": built, "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kinds).train()
        architectures.randomise(model)
        for param in model.parameters():
            if param.is_floating_point():
                param.data.mul_(0.3)
        if not give(model, attention):
            return
        with kernels_of(attention):
            found = leak(model)
        yield found
        if found < TOLERANCE:
            return


def _without_chance(config: PreTrainedConfig) -> None:
    """Switch off dropout, so that the output depends only on the input."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _without_chance(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)


def main(chosen: Sequence[str]) -> int:
    """Print the types that keep samples apart, and the reason for each of the others."""
    types = [each for each in architectures.CAUSAL_TYPES if each not in architectures.NOT_BUILDABLE]
    apart = []
    for each in chosen or types:
        try:
            why = verdict(each)
        except Exception as error:  # an error is the type's verdict
            why = f"{type(error).__name__}: {error}".replace("\n", " ")[:120]
        sys.stdout.write(f"{each}: {why or 'apart'}\n")
        sys.stdout.flush()
        apart += [] if why else [each]
    sys.stdout.write(" ".join(apart) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
