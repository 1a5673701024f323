"""Answer a few sample prompts before and after the training: the quickest way to see its effect.

All ranks generate together, since every forward pass gathers parameters from all of them. All get the same answers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zero_sft.data.samples.embedded_tokens import require_embedded
from zero_sft.data.sources.text_io import read_text
from zero_sft.data.templates.choose import Template
from zero_sft.errors import DataError
from zero_sft.generation_config import eos_token_ids, turn_ends
from zero_sft.json_text import JsonError, parse_json
from zero_sft.printable import excerpt
from zero_sft.rope import max_context_tokens, positions, text_config


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file: a JSON list of texts, or one prompt per line.

    Raises:
        DataError: the file can't be read, holds no prompts, or one that is not a text.
    """
    text = read_text(path, expected="a JSON list of prompts, or one prompt per line", argument="--sample_prompts")
    remedy = "Give a JSON list of texts, or one prompt per line."
    if not text.lstrip().startswith("["):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if _is_json_object(text) or all(map(_is_json_object, lines)):
            raise DataError(f"{path}: a prompt must be a text; got a JSON object. {remedy}", code="data.not_a_text")
        return lines
    try:
        prompts = parse_json(text)
    except JsonError as error:
        raise DataError(
            f"{path} can't be used as JSON: {error.place_and_reason}. {remedy}", code="data.prompts_not_json"
        ) from error
    if not prompts:
        raise DataError(f"{path} holds no prompts. {remedy}", code="data.no_prompts")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            got = "null" if prompt is None else excerpt(prompt)
            raise DataError(f"{path}: prompt {number} must be a text; got {got}. {remedy}", code="data.not_a_text")
    return prompts


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except JsonError:
        return False


def require_answerable(prompts: Sequence[str], tokenizer: Any, template: Template, config: Any) -> None:
    """Check that every token of the prompts has an embedding, and that each prompt leaves room for an answer. Rank 0.

    Raises:
        DataError: a prompt fails a check; the message names it.
    """
    if not prompts:
        return
    decoder_config = text_config(config)
    max_positions = _max_positions(decoder_config)
    for number, prompt in enumerate(prompts, 1):
        where = f"--sample_prompts, prompt {number}"
        ids = tokenizer(template.prompt(prompt), add_special_tokens=template.adds_special_tokens).input_ids
        require_embedded(ids, tokenizer, getattr(decoder_config, "vocab_size", None), where)
        if max_positions is not None and len(ids) >= max_positions:
            raise DataError(
                f"{where} has {len(ids):,} tokens, but the model has only {max_positions:,} positions for a prompt and its "
                "answer together. Shorten it.",
                code="data.prompt_too_long",
            )


def _max_positions(decoder_config: Any) -> int | None:
    """Return the size of the model's position table; None without one, as such models only get worse beyond their context."""
    return max_context_tokens(decoder_config) if positions(decoder_config) == "table" else None


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
    original_config, was_training = model.generation_config, model.training
    # The model's generation config may ask for sampling, several answers or a dict instead of tokens.
    model.generation_config = GenerationConfig(
        bos_token_id=original_config.bos_token_id,
        eos_token_id=list(eos_token_ids(original_config)) or None,
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
        model.generation_config = original_config
        model.train(was_training)
    new_tokens = sequences[:, batch["input_ids"].shape[1] :]
    ends = {*eos_token_ids(original_config), tokenizer.pad_token_id}
    answers = []
    for tokens in new_tokens.tolist():
        text, is_ended = _until_stop(tokenizer.decode(tokens, skip_special_tokens=True), stop_texts)
        is_cut_off = len(tokens) >= max_new_tokens and tokens[-1] not in ends and not is_ended
        answers.append(text.strip() + f" [cut off after {max_new_tokens} tokens]" * is_cut_off)
    return answers


def _until_stop(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop text, and whether there is one."""
    ends = [position for stop in stop_texts if (position := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
