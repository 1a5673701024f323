"""Vicuna's ids and labels, token for token, against what FastChat 0.2.36's training does with the slow Llama tokenizer.

`published` says that behaviour anew, from its description: one text for the conversation, tokenised whole and padded to the
longest length; then, for each part that ends in "</s>", the tokens up to "ASSISTANT:" are counted out and masked, and the whole
sample is masked if the counts don't add up. The slow tokenizer is SentencePiece itself, each stretch between special tokens
by itself.
"""

import random
import re

import pytest
import sentencepiece

from tests.data.tiny import conversation
from tests.real_tokenizers import REAL, sentencepiece_folder
from zero_sft.data.templates.vicuna import VICUNA_SYSTEM, VicunaTemplate
from zero_sft.data.tokenize import IGNORE_INDEX, tokenize_rendered
from zero_sft.hub.options import HubOptions
from zero_sft.tokenizer.setup import set_up

BOS, EOS, UNK = 1, 2, 0
SEPARATOR = " ASSISTANT: "


class Slow:
    """A slow Llama tokenizer (`legacy`): special tokens are cut out, what is between them goes to SentencePiece."""

    def __init__(self, model) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def __call__(self, text):
        ids = [BOS]
        for part in re.split("(<s>|</s>|<unk>)", text):
            special = {"<s>": BOS, "</s>": EOS, "<unk>": UNK}.get(part)
            ids += [special] if special is not None else self.pieces.encode(part) if part else []
        return ids


def prompt(texts):
    """The text of `vicuna_v1.1`: a role whose text is empty stands alone with its colon."""
    text = f"{VICUNA_SYSTEM} "
    for number, message in enumerate(texts):
        role, end = (("USER", " "), ("ASSISTANT", "</s>"))[number % 2]
        text += f"{role}: {message}{end}" if message else f"{role}:"
    return text


def published(texts, slow, longest):
    """Ids and labels of one conversation, padded; labels are all -100 where FastChat loses the sample."""
    text = prompt(texts)
    ids = slow(text)[:longest]
    ids += [UNK] * (longest - len(ids))
    labels, position = list(ids), 1
    labels[0] = IGNORE_INDEX
    for part in text.split("</s>"):
        pieces = part.split(SEPARATOR)
        if part == "" or len(pieces) != 2:
            break
        masked = len(slow(pieces[0] + SEPARATOR)) - 2
        labels[position : position + masked] = [IGNORE_INDEX] * len(labels[position : position + masked])
        position += len(slow(part))
    labels[position:] = [IGNORE_INDEX] * len(labels[position:])
    if position < longest and position != sum(token != UNK for token in ids):
        labels = [IGNORE_INDEX] * longest
    return ids, labels


@pytest.fixture(scope="module")
def pair(real_models, tmp_path_factory):
    """This project's tokenizer, and the slow one, of the same SentencePiece model."""
    model = real_models / REAL["v1"]
    folder = sentencepiece_folder(
        tmp_path_factory.mktemp("vicuna") / "model", model, tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True
    )
    return set_up(folder, HubOptions(), 4096, "right"), Slow(model)


def ours(texts, tokenizer, longest):
    template = VicunaTemplate()
    (example,) = tokenize_rendered([template.render(conversation(*texts))], tokenizer, longest)
    pad = longest - len(example.input_ids)
    return example.input_ids + [UNK] * pad, example.labels + [IGNORE_INDEX] * pad


KEPT = {
    "single turn": ("Hi", "Hello."),
    "multi-turn": ("Hi", "Hello.", "How are you?", "Fine, thanks.", "Good.", "Yes."),
    "CJK": ("你好,世界", "再见 こんにちは 안녕", "繁體字", "漢字かなカナ"),
    "emoji": ("😀👩‍👩‍👧‍👦?", "🤯 ok 🏳️‍🌈", "🙂", "🙃🙃"),
    "code": ("def f(x):\n    return x", "```python\nf(2)  # 2\n\n\n\tend\n```", "and?", "x = {'a': [1, 2]}\n"),
    "white space at both ends": (" a ", "  b  ", "\n\nc\t", "\td\n\n"),
    "colons and roles": ("USER: x", "USER: y ASSISTANT:z", "ASSISTANT", "a:b"),
    "an empty answer": ("Hi", "", "More?", "Yes."),
    "numbers and marks": ("1 + 1 = ?", "2, or 2.0 -- 100 %!", "#$&", "<a href='x'>y</a>"),
    "right to left": ("مرحبا بالعالم", "שלום עולם", "नमस्ते", "สวัสดี"),
}


@pytest.mark.parametrize("longest", [2048, 90, 62, 48])
@pytest.mark.parametrize("name", KEPT)
def test_token_for_token(pair, name, longest):
    tokenizer, slow = pair
    ids, labels = published(KEPT[name], slow, longest)
    assert ours(KEPT[name], tokenizer, longest) == (ids, labels)
    assert longest < 2048 or any(label != IGNORE_INDEX for label in labels), "FastChat trains on it"


WORDS = "a the Hello, x: USER ASSISTANT 你 好 😀 é ß \n \t def f(x) 12 ' \" <b> // … ½ 日本 \u00a0 \u200b"


def test_random_conversations(pair):
    tokenizer, slow = pair
    rng = random.Random(3)
    words = WORDS.split(" ")
    gaps = ["", " ", "  ", "    "]
    trained = 0
    for _ in range(400):
        count = 2 * rng.randint(1, 4)
        texts = ["".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.randint(0, 14))) for _ in range(count)]
        longest = rng.choice([60, 80, 120, 2048])
        ids, labels = published(texts, slow, longest)
        own_ids, own_labels = ours(texts, tokenizer, longest)
        assert own_ids == ids, texts
        if any(label != IGNORE_INDEX for label in labels):
            trained += 1
            assert own_labels == labels, texts
    assert trained > 200


LOST = {
    "an end token in the text": ("a</s>b", "c", "d", "e"),
    "the separator in the text": ("Say ASSISTANT: x", "y"),
    "an empty question": ("", "a", "b", "c"),
    "the token that it pads with in the text": ("What is <unk>?", "A token.", "Yes?", "Yes."),
}


@pytest.mark.parametrize("name", LOST)
def test_what_fastchat_loses_is_kept(pair, name):
    """FastChat masks all of these samples; here their answers are trained on."""
    tokenizer, slow = pair
    texts = LOST[name]
    _, labels = published(texts, slow, 2048)
    assert all(label == IGNORE_INDEX for label in labels)
    _, own = ours(texts, tokenizer, 2048)
    text = tokenizer.decode([label for label in own if label != IGNORE_INDEX])
    assert all(answer in text for answer in texts[1::2])
    assert sum(label == EOS for label in own) == len(texts) // 2, "each answer ends"


def test_ids_by_hand(pair):
    """One conversation, spelt out in pieces."""
    tokenizer, _ = pair
    ids, labels = ours(("Hi", "Hello.", "Bye", "Yes."), tokenizer, 64)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    start = pieces.index("▁US")
    answered = ["▁ASS", "IST", "ANT", ":"]
    expected = [
        "▁US",
        "ER",
        ":",
        "▁Hi",
        *answered,
        "▁Hello",
        ".",
        "</s>",
        "▁US",
        "ER",
        ":",
        "▁By",
        "e",
        *answered,
        "▁Yes",
        ".",
        "</s>",
    ]
    assert pieces[start : start + len(expected)] == expected
    assert set(pieces[start + len(expected) :]) == {"<unk>"}
    trained = [piece for piece, label in zip(pieces, labels, strict=True) if label != IGNORE_INDEX]
    assert trained == ["▁Hello", ".", "</s>", "▁Yes", ".", "</s>"]
