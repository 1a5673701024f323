"""Answer a few sample prompts before and after the training: the quickest way to see its effect.

All ranks generate together, since every forward pass gathers parameters from all of them. All get the same answers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zero_sft.data.samples.embedded_tokens import require_embedded
from zero_sft.data.sources.text_io import read_text
from zero_sft.data.templates.choose import Template
from zero_sft.errors import DataError
from zero_sft.generation_config import eos_token_ids, turn_ends
from zero_sft.rope import positions, readable_tokens, text_config


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file: a JSON list of texts, or one prompt a line.

    Raises:
        DataError: the file can't be read or holds no prompts.
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
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"{path} holds no prompts. Give a JSON list of texts, or one prompt a line.", code="data.no_prompts")
    return prompts


def require_answerable(prompts: Sequence[str], tokenizer: Any, template: Template, config: Any) -> None:
    """Check that every token of the prompts has an embedding, and that each prompt leaves room for an answer. Rank 0.

    Raises:
        DataError: a prompt fails a check; the message names it.
    """
    if not prompts:
        return
    text = text_config(config)
    max_positions = _max_positions(text)
    for number, prompt in enumerate(prompts, 1):
        where = f"--sample_prompts, prompt {number}"
        ids = tokenizer(template.prompt(prompt), add_special_tokens=template.adds_special_tokens).input_ids
        require_embedded(ids, tokenizer, getattr(text, "vocab_size", None), where)
        if max_positions is not None and len(ids) >= max_positions:
            raise DataError(
                f"{where} has {len(ids):,} tokens, but the model has only {max_positions:,} positions for a prompt and its "
                "answer together. Shorten it.",
                code="data.prompt_too_long",
            )


def _max_positions(text: Any) -> int | None:
    """Return the size of the model's position table; None without one, as such models only get worse beyond their context."""
    return readable_tokens(text) if positions(text) == "table" else None


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], *, template: Template, max_new_tokens: int) -> list[str]:
    """Generate greedy answers to `prompts`. Every rank, with the same prompts; communicates in the model's forward pass.

    Args:
        model: partitioned, before or after `deepspeed.initialize` (the inner model, not the engine).
        max_new_tokens: the maximum length of an answer; less if the model has fewer positions left after the prompt.
    """
    import torch
    from transformers import GenerationConfig

    stop_texts = turn_ends(tokenizer, template.turn_ends).texts
    texts = [template.prompt(prompt) for prompt in prompts]
    adds_tokens = template.adds_special_tokens
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=adds_tokens)
    max_positions = _max_positions(text_config(model.config))
    if max_positions is not None:
        max_new_tokens = max(1, min(max_new_tokens, max_positions - batch["input_ids"].shape[1]))
    saved_config, was_training = model.generation_config, model.training
    # The model's generation config may ask for sampling, several answers or a dict instead of tokens.
    model.generation_config = GenerationConfig(
        bos_token_id=saved_config.bos_token_id,
        eos_token_id=list(eos_token_ids(saved_config)) or None,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
    )
    model.eval()
    try:
        with torch.no_grad():
            sequences = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                stop_strings=list(stop_texts) or None,
                tokenizer=tokenizer,
                synced_gpus=True,
            )
    finally:
        model.generation_config = saved_config
        model.train(was_training)
    new_tokens = sequences[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [_cut_at_stop(text, stop_texts).strip() for text in answers]


def _cut_at_stop(text: str, stop_texts: Sequence[str]) -> str:
    for stop in stop_texts:
        text = text.partition(stop)[0]
    return text
