"""A few prompts, answered before and after: the quickest look at what a training did.

All ranks answer together, since every forward pass gathers the parameters from all of them; the answers are the same on all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zero_sft.config import text_config
from zero_sft.data.samples.embedded_tokens import require_embedded
from zero_sft.data.sources.text_io import read_text
from zero_sft.data.templates.choose import Template
from zero_sft.errors import DataError
from zero_sft.generation_config import eos_token_ids, turn_ends
from zero_sft.rope import positions, readable_tokens


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: a JSON list of texts, or one a line.

    Raises:
        DataError: no such file, or nothing in it.
    """
    text = read_text(path, expected="a JSON list of prompts, or one prompt a line", argument="--sample_prompts")
    if text.lstrip().startswith("["):
        try:
            prompts = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON: {error}. Give a list of texts, or one prompt a line.", code="data.prompts_not_json"
            ) from error
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise DataError(f"{path} holds no prompts. Give a JSON list of texts, or one prompt a line.", code="data.no_prompts")
    return prompts


def require_answerable(prompts: Sequence[str], tokenizer: Any, template: Template, config: Any) -> None:
    """Raise where a prompt has a token without an embedding, or leaves no room for an answer. Rank 0.

    Raises:
        DataError: naming the prompt.
    """
    if not prompts:
        return
    text = text_config(config)
    most = _most_positions(text)
    for number, prompt in enumerate(prompts, 1):
        where = f"--sample_prompts, prompt {number}"
        ids = tokenizer(template.prompt(prompt), add_special_tokens=template.adds_special_tokens).input_ids
        if getattr(text, "vocab_size", None):
            require_embedded(ids, tokenizer, text.vocab_size, where)
        if most is not None and len(ids) >= most:
            raise DataError(
                f"{where} has {len(ids):,} tokens, and the model has positions for {most:,}, prompt and answer together. "
                "Shorten it.",
                code="data.prompt_too_long",
            )


def _most_positions(text: Any) -> int | None:
    """The longest sequence of a model that looks positions up in a table; the others only get worse beyond their context."""
    return readable_tokens(text) if positions(text) == "table" else None


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], *, template: Template, max_new_tokens: int) -> list[str]:
    """Greedy answers to `prompts`. Every rank, with the same prompts; communicates in the model's forward.

    Args:
        model: partitioned, before or after `deepspeed.initialize` (the inner model, not the engine).
        max_new_tokens: tokens an answer at most; fewer where the model has no positions for them.
    """
    import torch
    from transformers import GenerationConfig

    stop_texts = turn_ends(tokenizer, template.turn_ends).texts
    texts = [template.prompt(each) for each in prompts]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=template.adds_special_tokens)
    finally:
        tokenizer.padding_side = side
    most = _most_positions(text_config(model.config))
    if most is not None:
        max_new_tokens = max(1, min(max_new_tokens, most - batch["input_ids"].shape[1]))
    own, training = model.generation_config, model.training
    # The model's settings may ask for sampling, several answers or other results than tokens.
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=list(eos_token_ids(own)) or None,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
    )
    model.eval()
    try:
        with torch.no_grad():
            out = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                stop_strings=list(stop_texts) or None,
                tokenizer=tokenizer,
                synced_gpus=True,
            )
    finally:
        model.generation_config = own
        model.train(training)
    new = out[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [_without_end(text, stop_texts).strip() for text in answers]


def _without_end(text: str, stop_texts: Sequence[str]) -> str:
    for stop in stop_texts:
        text = text.partition(stop)[0]
    return text
