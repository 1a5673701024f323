"""The chat templates of published models, as TRL ships them: what is trained on is what the model writes, to the character."""

import re
from pathlib import Path

import pytest
import trl

from tests.data.tiny import byte_tokenizer, conversation, trained_text
from zero_sft.data.labels import tokenise
from zero_sft.data.templates import choose_template

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_MARKS = re.compile(r"<\|?[^<>\s{}'\"|]{2,40}\|?>|<｜[^>]*?｜>")

ENDS = {  # model: what ends an answer in the middle of a conversation, and the last one
    "llama3_1": ("<|eot_id|>",) * 2, "qwen2_5": ("<|im_end|>",) * 2, "qwen3": ("<|im_end|>",) * 2,
    "qwen3_instruct_2507": ("<|im_end|>",) * 2, "qwen3_5_think": ("<|im_end|>",) * 2, "gemma": ("<end_of_turn>",) * 2,
    "gemma3": ("<end_of_turn>",) * 2, "deepseek_r1_distill": ("<｜end▁of▁sentence｜>",) * 2,
    "deepseekv3": ("<｜end▁of▁sentence｜>",) * 2, "gptoss": ("<|end|>", "<|return|>"), "phi3": ("<|end|>",) * 2,
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",) * 2,
}  # fmt: skip
STRIPPED = ("llama3_1", "gemma", "gemma3", "qwen3_5_think")  # white space at an answer's ends is dropped


def model_of(name):
    """A tokenizer with the template and its special tokens, and the template."""
    source = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = byte_tokenizer(source)
    tokenizer.add_tokens(sorted(set(_MARKS.findall(source)) - {"<think>", "</think>"}), special_tokens=True)
    return tokenizer, choose_template("model", tokenizer)


def trained(name, *texts, system=None):
    """What is trained on of a conversation, through the model's tokens."""
    tokenizer, template = model_of(name)
    (example,) = tokenise([template.render(conversation(*texts, system=system))], tokenizer, 100_000)
    return trained_text(example, tokenizer)


@pytest.mark.parametrize("name", ENDS)
def test_answers_and_their_ends(name):
    middle, last = ENDS[name]
    system = None if name == "gemma" else "Be brief."
    assert trained(name, "Hi", "Hello.", "More?", "No.", system=system) == [f"Hello.{middle}", f"No.{last}"]
    assert trained(name, "Hello.", "Hello.", "Hello.", "Hello.") == [f"Hello.{middle}", f"Hello.{last}"]
    assert trained(name, "你好", "你好,世界 👩‍👩‍👧‍👦", "x", "def f():\n    return 1") == [
        f"你好,世界 👩‍👩‍👧‍👦{middle}", f"def f():\n    return 1{last}"
    ]  # fmt: skip


@pytest.mark.parametrize("name", STRIPPED)
def test_answers_that_are_stripped(name):
    middle, last = ENDS[name]
    assert trained(name, " Hi ", "  Hello. \n", "More?", "No.\n\n") == [f"Hello.{middle}", f"No.{last}"]


THOUGHTS = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "earlier", "last"),
    [
        ("qwen2_5", THOUGHTS, THOUGHTS),
        ("llama3_1", THOUGHTS, THOUGHTS),
        ("qwen3", "", THOUGHTS),
        ("qwen3_5_think", "", THOUGHTS.removeprefix("<think>\n")),  # the prompt has begun them
        ("deepseek_r1_distill", "", ""),
    ],
)
def test_thoughts_are_trained_on_where_they_are_kept(name, earlier, last):
    ends = ENDS[name]
    answers = trained(name, "Hi", f"{THOUGHTS}Hello.", "More?", f"{THOUGHTS}No.")
    assert answers == [f"{earlier}Hello.{ends[0]}", f"{last}No.{ends[1]}"]
