"""`zero_sft.data.dataset`: nothing is silently lost, padding is told by position, and the trainer gets what it takes."""

import json
import pickle
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from tests.data.tiny import CHATML, byte_tokenizer, prepare
from tests.errors import raises
from zero_sft.data.collator import Collator
from zero_sft.data.dataset import require_one_batch
from zero_sft.data.report import CUT_OFF, NO_ANSWER
from zero_sft.data.samples.conversation import UNANSWERED
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.tokenize import IGNORE_INDEX


def written(tmp_path, *conversations):
    path = tmp_path / "data.json"
    turns = [[{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)] for texts in conversations]
    path.write_text(json.dumps([{"id": str(number), "conversations": each} for number, each in enumerate(turns)]))
    return path


def test_what_is_dropped_and_cut_is_counted(tmp_path):
    path = written(tmp_path, ("a", "b"), ("a", ""), ("a",), ("x" * 100, "b"), ("a", "y" * 100), ("a", "", "c", "d", "e"))
    prepared = prepare(path, byte_tokenizer(CHATML), model_max_length=60)
    report = prepared.reports[0]
    assert (report.samples, report.kept, prepared.rows.num_rows) == (6, 3, 3)
    assert report.dropped == {"without an answer to train on": 2, "cut off before the first answer": 1}
    assert (report.dropped_turns[UNANSWERED], report.empty_answers, report.cut_samples) == (2, 1, 1)
    assert report.tokens == sum(prepared.rows["length"]) == sum(map(len, prepared.rows["input_ids"]))
    assert report.trained_tokens == sum(label != IGNORE_INDEX for labels in prepared.rows["labels"] for label in labels)
    lines = "\n".join(report.lines())
    for part in (
        "3 of 6 samples, 8 turns (format sharegpt, template model)",
        "2 without an answer",
        "1 sample longer",
        "2 last, unanswered",
        "1 empty answer, not",
    ):
        assert part in lines


def test_a_clean_file_makes_a_short_report(tmp_path):
    assert len(prepare(written(tmp_path, ("a", "b")), byte_tokenizer(), model_max_length=512).reports[0].lines()) == 2


@pytest.mark.parametrize("template", ["vicuna", "model"])
def test_lazy_gives_the_same_samples(tmp_path, template):
    path = written(tmp_path, ("a", "b"), ("c",), ("d", "e" * 300, "f", "g"))
    eager, lazy = (
        prepare(path, byte_tokenizer(CHATML), chat_template=template, model_max_length=300, lazy=each).rows
        for each in (False, True)
    )
    assert len(lazy) == len(eager) == 2
    assert lazy[:] == {key: eager[:][key] for key in ("input_ids", "labels", "weights")}
    assert len(lazy[1]["input_ids"]) == 300
    assert lazy.__getitems__([1, 0]) == [lazy[1], lazy[0]]
    assert pickle.loads(pickle.dumps(lazy))[0] == lazy[0]  # noqa: S301 - as the data loader's workers get it


def test_lazy_keeps_a_sample_that_is_cut_off_without_labels(tmp_path):
    path = written(tmp_path, ("x" * 100, "b"), ("a", "b"))
    prepared = prepare(path, byte_tokenizer(CHATML), model_max_length=60, lazy=True)
    assert set(prepared.rows[0]["labels"]) == {IGNORE_INDEX}
    assert prepared.reports[0].tokens is None
    assert "tokenised when they are needed" in prepared.reports[0].lines()[1]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("count", [2, 1100])
def test_data_of_which_tokenising_leaves_nothing_is_refused(tmp_path, lazy, count):
    """Lazily, too: an evaluation on it has a loss of nan."""
    path = written(tmp_path, *[("x" * 100, "b")] * count)
    with raises("data.nothing_left", f"({count:,} {CUT_OFF})", "--model_max_length", " 60") as caught:
        prepare(path, byte_tokenizer(CHATML), model_max_length=60, lazy=lazy)
    assert re.search(r"\b1\d+ tokens", str(caught.value)), "the shortest sample's"
    path = written(tmp_path, *[("x" * 100, "b")] * count, ("a", "b"))
    assert prepare(path, byte_tokenizer(CHATML), model_max_length=60, lazy=lazy).rows


def test_lazy_finds_an_unusable_template_at_the_start(tmp_path):
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}")
    with raises("data.template_changes_texts"):
        prepare(written(tmp_path, ("a", "b")), tokenizer, model_max_length=60, lazy=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_nothing_left_to_train_on(tmp_path, lazy):
    with raises("data.nothing_left", f"(2 {NO_ANSWER})") as caught:
        prepare(written(tmp_path, ("a",), ("a", "")), byte_tokenizer(), model_max_length=512, lazy=lazy)
    assert "--model_max_length" not in str(caught.value)


def test_everything_cut_off(tmp_path):
    with raises("data.nothing_left", f"(1 {CUT_OFF})", "--model_max_length", " 20,", "177 tokens"):
        prepare(written(tmp_path, ("a", "b")), byte_tokenizer(), model_max_length=20)


def test_one_batch_is_required(tmp_path):
    prepared = prepare(written(tmp_path, *[("a", "b")] * 6), byte_tokenizer(), model_max_length=512)
    require_one_batch(prepared, world_size=3, per_device_batch_size=2)
    with raises("data.too_few_samples", "6 usable samples (", " 8:", " 4 ", "2 ranks"):
        require_one_batch(prepared, world_size=2, per_device_batch_size=4)
    packed = replace(prepared, rows=prepared.rows.select([0]), packing_note="6 samples packed into 1 row")
    with raises("data.too_few_samples", "6 samples in 1 packed row (", " 2:", " 1 ", "2 ranks", "--packing"):
        require_one_batch(packed, world_size=2, per_device_batch_size=1)


def test_an_end_token_that_pads_stays_in_the_loss(tmp_path):
    tokenizer = byte_tokenizer(pad_token="</s>")
    dataset = prepare(written(tmp_path, ("a", "b"), ("c", "defg")), tokenizer, model_max_length=512).rows
    batch = Collator(pad_token_id=tokenizer.pad_token_id)([dataset[0], dataset[1]])
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0, -4:].tolist() == [end] * 4  # the answer's own, then three of padding
    assert batch["labels"][0, -4:].tolist() == [end, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert batch["attention_mask"][0, -4:].tolist() == [1, 0, 0, 0]
    assert batch["labels"][1, -1].item() == end


@pytest.mark.parametrize(
    ("multiple_of", "ids", "mask"),
    [
        (None, [[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
        (4, [[1, 2, 3, 0], [4, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (3, [[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
def test_padding(multiple_of, ids, mask):
    samples = [
        {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3], "length": 3},
        {"input_ids": [4], "labels": [4], "length": 1},
    ]
    batch = Collator(pad_token_id=0, multiple_of=multiple_of)(samples)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    expected = [
        [token if on and token != 1 else IGNORE_INDEX for token, on in zip(*row, strict=True)]
        for row in zip(ids, mask, strict=True)
    ]
    assert batch["labels"].tolist() == expected
    assert {each.dtype for each in batch.values()} == {torch.int64}


def trained(prepared, tokenizer):
    return [
        tokenizer.decode(
            [token for token, label in zip(each["input_ids"], each["labels"], strict=True) if label != IGNORE_INDEX]
        )
        for each in prepared.rows
    ]


@pytest.mark.parametrize("template", ["vicuna", "model"])
def test_which_answers_count(tmp_path, template):
    tokenizer, end = byte_tokenizer(CHATML), {"vicuna": "</s>", "model": "<|im_end|>"}[template]
    options = {"chat_template": template, "model_max_length": 512}
    path = written(tmp_path, ("a", "bb", "c", "dd"))
    lead = " " if template == "vicuna" else ""
    assert trained(prepare(path, tokenizer, **options), tokenizer) == [f"{lead}bb{end}{lead}dd{end}"]
    last = prepare(path, tokenizer, parser=SampleParser(train_on="last"), **options)
    assert trained(last, tokenizer) == [f"{lead}dd{end}"]
    flagged = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb", "weight": 0}]
    path.write_text(
        json.dumps([{"messages": [*flagged, flagged[0], {"role": "assistant", "content": "dd"}]}, {"messages": flagged}])
    )
    prepared = prepare(path, tokenizer, **options)
    assert trained(prepared, tokenizer) == [f"{lead}dd{end}"]
    assert prepared.reports[0].dropped == {"without an answer to train on": 1}


@pytest.mark.parametrize("lazy", [False, True])
def test_plain_text_gets_no_template_and_an_end(tmp_path, lazy):
    tokenizer = byte_tokenizer(CHATML)
    path = tmp_path / "data.jsonl"
    samples = [{"prompt": "2+2=", "completion": "4"}, {"text": "abc"}, {"text": "<s>abc</s>"}, {"text": ""}]
    path.write_text("\n".join(map(json.dumps, samples)))
    prepared = prepare(path, tokenizer, model_max_length=512, lazy=lazy)
    assert [tokenizer.decode(each["input_ids"]) for each in prepared.rows] == ["<s>2+2=4</s>", "<s>abc</s>", "<s>abc</s>"]
    assert trained(prepared, tokenizer) == ["4</s>", "abc</s>", "abc</s>"]


def test_a_sample_that_the_template_refuses_is_skipped_if_wished(tmp_path):
    path = tmp_path / "data.json"
    tool = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "7"}]
    fine = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps([{"messages": [*tool, fine[1]]}, {"messages": fine}]))
    options = {"chat_template": "vicuna", "model_max_length": 512}
    with raises("data.vicuna_without_tools", "sample 1"):
        prepare(path, byte_tokenizer(CHATML), **options)
    report = prepare(path, byte_tokenizer(CHATML), parser=SampleParser(on_bad_sample="skip"), **options).reports[0]
    assert (report.samples, report.kept, report.bad) == (2, 1, 1)
    assert "1 bad sample skipped, such as" in "\n".join(report.lines())
    tokenizer = byte_tokenizer(CHATML)
    assert trained(prepare(path, tokenizer, model_max_length=512), tokenizer) == ["b<|im_end|>" * 2, "b<|im_end|>"]


@pytest.mark.parametrize("lazy", [False, True])
def test_what_the_template_refuses_is_skipped_if_wished_lazily_too(tmp_path, lazy):
    tokenizer = byte_tokenizer(
        CHATML.replace("{% for", "{% if messages[0].content == 'bad' %}{{ raise_exception('bad') }}{% endif %}{% for", 1)
    )
    path = written(tmp_path, ("bad", "a"), ("b", "c"), ("bad", "d"))
    prepared = prepare(path, tokenizer, model_max_length=90, lazy=lazy, parser=SampleParser(on_bad_sample="skip"))
    assert (prepared.reports[0].bad, len(prepared.rows)) == (2, 1)
    assert prepared.rows[0]["input_ids"]


def chat(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_long_conversations_are_split_between_rounds(tmp_path):
    """Each part has the system text; no answer is lost; a round that fits nowhere is cut by itself."""
    tokenizer = byte_tokenizer(CHATML)
    path = tmp_path / "data.json"
    system = {"role": "system", "content": "S"}
    rounds = [("a" * 9, "b" * 9), ("c" * 9, "d" * 9), ("e" * 9, "f" * 9), ("g" * 9, "h" * 200), ("i", "j")]
    talk = [system, *(turn for each in rounds for turn in chat(*each))]
    path.write_text(json.dumps([{"messages": talk}, {"messages": chat("x", "y")}]))
    options = {"model_max_length": 90, "chat_template": "model"}
    prepared = prepare(path, tokenizer, overlong="split", **options)
    texts = [tokenizer.decode(each["input_ids"]) for each in prepared.rows]
    assert [text.count("<|im_start|>user") for text in texts] == [2, 1, 1, 1, 1]
    assert all(text.startswith("<|im_start|>system\nS<|im_end|>\n") for text in texts[:-1])
    assert all(len(ids) <= 90 for ids in prepared.rows["input_ids"])
    ends = "<|im_end|>"
    assert trained(prepared, tokenizer)[:2] == [f"{'b' * 9}{ends}{'d' * 9}{ends}", f"{'f' * 9}{ends}"]
    assert trained(prepared, tokenizer)[3:] == [f"j{ends}", f"y{ends}"]
    (report,) = prepared.reports
    assert (report.split, report.cut_samples, report.samples, report.kept) == (1, 1, 2, 5)
    assert any("1 sample longer than --model_max_length, split" in line for line in report.lines())
    assert report.turns == 12


def test_parts_that_are_lost_are_counted_as_parts(tmp_path):
    """A round whose question fills the window, and with the last answer alone all rounds but one."""
    tokenizer, path = byte_tokenizer(CHATML), tmp_path / "data.json"
    path.write_text(
        json.dumps([{"messages": chat("x" * 100, "a", "b", "c" * 9, "d", "e" * 9)}, {"messages": chat("y" * 100, "z")}])
    )
    (report,) = prepare(path, tokenizer, overlong="split", model_max_length=50).reports
    assert (report.split, report.kept, report.untrained_share) == (1, 2, 0.5)
    assert (report.dropped_parts, report.dropped) == ({CUT_OFF: 1}, {CUT_OFF: 1})
    assert "parts of split samples dropped: 1 cut off before the first answer" in report.lines()
    (report,) = prepare(path, tokenizer, overlong="split", parser=SampleParser(train_on="last"), model_max_length=50).reports
    assert (report.split, report.kept) == (1, 1)
    assert report.dropped_parts == {NO_ANSWER: 2}


def test_a_part_that_the_template_refuses_costs_its_sample_alone(tmp_path):
    alone = "{% if messages | length == 2 and messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer, path = byte_tokenizer(alone + CHATML), tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": chat("a", "b" * 60, "bad", "c" * 60)}, {"messages": chat("y", "z")}]))
    with raises("data.template_fails", "sample 1, part 2"):
        prepare(path, tokenizer, overlong="split", model_max_length=100)
    options = {"overlong": "split", "parser": SampleParser(on_bad_sample="skip"), "model_max_length": 100}
    (report,) = (prepared := prepare(path, tokenizer, **options)).reports
    assert (report.bad, report.kept, report.samples) == (1, 1, 2)
    assert "50% of the samples are bad" in prepared.warnings()[0]


def test_long_conversations_are_dropped_and_counted(tmp_path):
    path = written(tmp_path, ("a", "b"), ("a", "y" * 100))
    prepared = prepare(path, byte_tokenizer(CHATML), model_max_length=60, overlong="drop")
    assert prepared.reports[0].dropped == {"longer than --model_max_length": 1}
    assert prepared.warnings() == [], "the user asked for it"
    with raises("data.nothing_left", "--overlong truncate"):
        prepare(
            written(tmp_path, ("a", "y" * 100)),
            byte_tokenizer(CHATML),
            model_max_length=60,
            overlong="drop",
        )
    with raises("data.overlong_needs_lengths"):
        prepare(path, byte_tokenizer(CHATML), model_max_length=60, overlong="drop", lazy=True)


def test_what_was_not_cut_is_not_said_to_be(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "<|im_end|>"}')
    tokenizer = byte_tokenizer(eos_token="<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with raises("data.nothing_left", f"(1 {NO_ANSWER})"):
        prepare(path, tokenizer, model_max_length=60)
