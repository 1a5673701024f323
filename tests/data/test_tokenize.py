"""`zero_sft.data.tokenize`: exactly the assistant's tokens, on any tokenizer, whatever the text."""

import pytest
from tokenizers import AddedToken, processors

from tests.data.tiny import CHATML, byte_tokenizer, conversation, trained_text, word_tokenizer
from tests.errors import raises
from zero_sft.data.samples.conversation import PromptCompletion
from zero_sft.data.templates.choose import choose_template, render
from zero_sft.data.templates.vicuna import VICUNA_SYSTEM
from zero_sft.data.tokenize import IGNORE_INDEX, token_range, tokenize_rendered

SYSTEM_WORDS = VICUNA_SYSTEM.split(" ")
WORDS = [SYSTEM_WORDS[0], *dict.fromkeys(f"▁{word}" for word in SYSTEM_WORDS[1:]), "▁USER:", "USER:", "▁ASSISTANT:", "▁Hi",
         "▁Hello.", "▁More?", "▁No.", "▁"]  # fmt: skip


def one(texts, tokenizer, template=None, longest=4096):
    chosen = choose_template(template, tokenizer)
    (example,) = tokenize_rendered([chosen.render(conversation(*texts))], tokenizer, longest)
    return example


def test_vicuna_ids_and_labels_exactly():
    tokenizer = word_tokenizer(WORDS)
    example = one(("Hi", "Hello.", "More?", "No."), tokenizer)
    system = [SYSTEM_WORDS[0], *(f"▁{word}" for word in SYSTEM_WORDS[1:])]
    turns = ["▁USER:", "▁Hi", "▁ASSISTANT:", "▁Hello.", "</s>", "USER:", "▁More?", "▁ASSISTANT:", "▁No.", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(["<s>", *system, *turns])
    assert example.input_ids == ids
    assert tokenizer.unk_token_id not in ids
    trained = [False] * (1 + len(system)) + [False, False, False, True, True, False, False, False, True, True]
    assert example.labels == [token if on else IGNORE_INDEX for token, on in zip(ids, trained, strict=True)]
    assert example.trained_tokens == 4


@pytest.mark.parametrize(
    "texts",
    [
        ("Hi", "Hello."),
        ("Hi", "Hello.", "More?", "No.", "Why?", "Because."),
        ("你好", "你好,世界", "再见", "再见!"),
        ("😀?", "😀👩‍👩‍👧‍👦 ok 🏳️‍🌈"),
        (" a ", "  b  "),
        ("q", "\n\nnew\tlines\n"),
        ("def f(x):\n    return x", "f(2)  # 2\n"),
        ("ASSISTANT: x", "USER: y ASSISTANT: z"),
        ("e\u0301", "Grüße ẞ"),
    ],
)
def test_what_is_trained_on_is_the_answers_and_their_ends(texts):
    vicuna, chatml = byte_tokenizer(), byte_tokenizer(CHATML)
    assert trained_text(one(texts, vicuna), vicuna) == [f" {text}</s>" for text in texts[1::2]]
    assert trained_text(one(texts, chatml), chatml) == [f"{text}<|im_end|>" for text in texts[1::2]]


def test_an_end_token_inside_the_text_loses_nothing():
    tokenizer = byte_tokenizer()
    assert trained_text(one(("a</s>b", "c</s>d"), tokenizer), tokenizer) == [" c</s>d</s>"]


def test_empty_turns():
    tokenizer = byte_tokenizer()
    assert trained_text(one(("", "a", "b", ""), tokenizer), tokenizer) == [" a</s>"]
    assert one(("a", ""), tokenizer).trained_tokens == 0


def test_no_second_beginning_token():
    with_bos = byte_tokenizer("{{ bos_token }}" + CHATML)
    assert one(("Hi", "Hello."), with_bos).input_ids.count(with_bos.bos_token_id) == 1
    assert one(("Hi", "Hello."), byte_tokenizer(CHATML)).input_ids.count(with_bos.bos_token_id) == 0
    assert one(("Hi", "Hello."), byte_tokenizer()).input_ids.count(with_bos.bos_token_id) == 1


def test_truncation_in_the_middle_of_an_answer():
    tokenizer = byte_tokenizer(CHATML)
    whole = one(("Hi", "Hello.", "More?", "No."), tokenizer)
    prompt = len("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") - len("<|im_start|><|im_end|><|im_start|>") + 3
    cut = one(("Hi", "Hello.", "More?", "No."), tokenizer, longest=prompt + 3)
    assert trained_text(cut, tokenizer) == ["Hel"]
    assert cut.input_ids == whole.input_ids[: prompt + 3]
    assert cut.cut_tokens == len(whole.input_ids) - prompt - 3
    assert cut.cut_trained_tokens == len("lo.") + 1 + len("No.") + 1
    assert one(("Hi", "Hello."), tokenizer, longest=prompt).trained_tokens == 0
    assert whole.cut_tokens == whole.cut_trained_tokens == 0


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False
        chat_template = None
        eos_token = "</s>"

        def get_added_vocab(self):
            return {"</s>": 2}

    with raises("data.tokenizer_without_offsets", "Slow"):
        one(("Hi", "Hello."), Slow())


@pytest.mark.parametrize(
    ("chars", "span", "expected"),
    [
        ([(0, 0), (0, 4), (4, 6), (6, 6), (6, 7)], (5, 7), (2, 5)),
        ([(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)], (2, 4), (1, 2)),
        ([(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)], (5, 8), (2, 4)),
        ([None, (0, 2), (2, 4), (4, 6), None], (0, 6), (1, 4)),
        ([None, (0, 2), (2, 4), (4, 6), None], (6, 9), (4, 4)),
        ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], (1, 2), (1, 4)),
        ([(0, 1), (3, 4)], (1, 3), (1, 1)),
        ([None, None], (0, 1), (2, 2)),
        ([], (0, 1), (0, 0)),
    ],
)
def test_token_range(chars, span, expected):
    assert token_range(chars.__getitem__, len(chars), span) == expected


def test_a_header_that_takes_the_white_space_behind_it_is_not_trained_on():
    """As Phi-3's, where the template tells no prompt."""
    tokenizer = byte_tokenizer("{% for m in messages %}{{ '<|eot|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}")
    tokenizer.add_tokens(
        [AddedToken("<|eot|>", special=True, rstrip=True), AddedToken("<|im_end|>", special=True, rstrip=True)]
    )
    (example,) = tokenize_rendered([choose_template("model", tokenizer).render(conversation("Hi", "Hello."))], tokenizer, 100)
    assert trained_text(example, tokenizer) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    "sample", [conversation("Hi", "Hello."), PromptCompletion(prompt="", completion="Hello.", where="here")]
)
def test_a_tokenizer_that_adds_an_end_of_its_own(sample):
    """The text has one already, which is trained on; a second would teach nothing."""
    tokenizer = byte_tokenizer()
    rendered = render(sample, choose_template("vicuna", tokenizer), tokenizer)
    expected = tokenize_rendered([rendered], tokenizer, 1000)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert tokenize_rendered([rendered], tokenizer, 1000) == expected
