"""No key that says what is to be trained on is ignored, and no value that says nothing is refused."""

import json
import re

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, prepare
from tests.errors import raises
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.conversation import UNANSWERED
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.errors import DataError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
TURNS = {"messages": MESSAGES}
PAIR = {"prompt": "Hi", "completion": "Hello."}
ALPACA = {"instruction": "Hi", "output": "Hello."}


def reading_of(tmp_path, *samples, data_format=None, parquet=False):
    path = tmp_path / ("data.parquet" if parquet else "data.json")
    if parquet:
        import datasets

        datasets.Dataset.from_list(list(samples)).to_parquet(path)
    else:
        path.write_text(json.dumps(samples))
    return SampleParser(options=ReadOptions(data_format=data_format)).read(LocalFiles(path=path).objects())


def answer(**marks):
    return {"messages": [MESSAGES[0], {**MESSAGES[1], **marks}]}


# As they are written for ms-swift, xtuner, axolotl, OpenAI, LLaMA-Factory, TRL (preferences, KTO, vision), FastChat's kin.
REFUSED = [
    *[{**layout, key: value} for layout in (TURNS, {"conversations": SHAREGPT}, ALPACA, PAIR) for key, value in (
        ("label", False), ("kto_tag", "false"), ("sample_weight", 0.5), ("loss", False), ("loss_scale", 0), ("mask", True),
        ("train", "false"), ("images", ["a.png"]), ("image", "a.png"), ("videos", ["a.mp4"]), ("audios", [{"path": "a.wav"}]),
        ("objects", {"bbox": [[0, 0, 1, 1]]}), ("system_prompt", "Be brief."), ("chosen", MESSAGES), ("rejected", "No."),
        ("rejected_response", "No."), ("text", "other"), ("response", "other"), ("labels", [1, 2]), ("loss_mask", [0, 1]),
        ("tool_choice", "auto"), ("answer_loss_mask", [1]), ("imageUrl", "a.png"), ("isMasked", True),
    )],
    *[{**layout, key: "other"} for layout in (TURNS, {"conversations": SHAREGPT}) for key in (
        "instruction", "prompt", "input", "output", "completion", "query"
    )],
    *[{**PAIR, key: value} for key, value in (
        ("tools", [{"name": "f"}]), ("functions", '[{"name": "f"}]'), ("chat_template_kwargs", {"thinking": False}),
    )],
    {**ALPACA, "context": "other"}, {**PAIR, "question": "other"}, {**ALPACA, "prompt": "other"},
    {"text": "Hi", "prompt": "other"}, {"text": "Hi", "images": ["a.png"]}, {"text": "Hi", "loss": 0}, {**PAIR, "system": "x"},
]  # fmt: skip


@pytest.mark.parametrize("sample", REFUSED, ids=lambda sample: "+".join(sample))
def test_a_key_with_a_meaning_is_refused(tmp_path, sample):
    *_, key = sample
    with raises("data.several_formats" if key == "text" else "data.key_of_another_format", "sample 1", f"`{key}`"):
        reading_of(tmp_path, sample)


LEFT_OUT = (  # marks of other tools, and values that take a sample out of the loss, or a part of it
    (
        "no_loss ignore_loss skip_train skipTrain not_trained exclude_from_train untrained skip do_not_train is_rejected "
        "isRejected ignore excluded train_on_inputs trainOnPrompt train_on_last loss_on_turn omit no_train NoLoss "
        "is_undesirable kto_rejected",
        (True, 1, "true", "yes", [True, False], {"turns": [1]}),
    ),
    (
        "is_desirable desirable is_train useForTraining trainable not_masked no_mask accepted mask_inputs unmasked "
        "used_in_training",
        (False, 0, "false", "no", [0, 1]),
    ),
    (
        "sample_weight example_weight exampleWeight lossWeight weighting token_weights turn_weights loss_weights weight2",
        (0, 0.0, "0", 0.5, [0, 1], [1, 1], False),
    ),
    ("loss_mask train_mask labels_mask maskLoss", (0, 1, True, False, [0, 1])),
)


@pytest.mark.parametrize(("key", "values"), [(key, values) for keys, values in LEFT_OUT for key in keys.split()])
@pytest.mark.parametrize("layout", [TURNS, {"conversations": SHAREGPT}, ALPACA, PAIR, {"text": "Hi"}], ids="+".join)
def test_a_mark_is_known_by_its_words(tmp_path, key, values, layout):
    for value in values:
        with raises("data.key_of_another_format", "sample 1", f"`{key}`"):
            reading_of(tmp_path, {**layout, key: value})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *((key, (False, 0, "false", 0.0, None, "", [])) for key in (
            "no_loss", "skipTrain", "not_trained", "untrained", "is_rejected", "train_on_inputs", "trainOnPrompt",
        )),
        *((key, (True, 1, 1.0, "True", None)) for key in (
            "sample_weight", "is_desirable", "useForTraining", "lossWeight", "accepted"
        )),
        *((key, (False, "false", None)) for key in ("is_masked", "masked")),
        *((key, (True, "true")) for key in ("not_masked", "mask_inputs")),
        ("skip_prompt_formatting", (True, False)),  # OpenHermes 2.5
        ("train_id", (0, "x")), ("weights_name", ("x",)), ("split", ("train", "test")), ("training_id", (3,)),
        ("AcceptedAnswerId", (3,)), ("title", ("Loss",)), ("painting", (False,)), ("brain", (0,)), ("lossless", (False,)),
    ],
)  # fmt: skip
def test_a_mark_that_surely_asks_for_nothing_passes(tmp_path, key, values):
    for value in values:
        assert len(reading_of(tmp_path, {**TURNS, key: value}).samples) == 1, value


TEXTS_LEFT_OUT = (
    ("reasoning_content reasoningContent thinking reasoning cot thoughts answer_cot chainOfThought", "hm"),
    (
        "systemPrompt System sys sys_prompt system_text system_instruction preamble instructions systemMessage",
        "You are a pirate.",
    ),
    ("my_system_prompt developer_message", "You are a pirate."),
    ("documents tool_definitions toolset toolDefinitions functionList", [{"a": 1}]),
    ("enable_thinking enableThinking", False),
    ("img imgs picture imgPath screenshots pic_url", "a.png"),
)


@pytest.mark.parametrize(("key", "value"), [(key, value) for keys, value in TEXTS_LEFT_OUT for key in keys.split()])
@pytest.mark.parametrize("layout", [TURNS, {"conversations": SHAREGPT}, ALPACA, PAIR], ids="+".join)
def test_a_text_that_is_left_out_is_known_by_its_words(tmp_path, key, value, layout):
    with raises("data.key_of_another_format", "sample 1", f"`{key}`"):
        reading_of(tmp_path, {**layout, key: value})
    for nothing in (None, "", [], {}, [{"a": None}]):
        assert len(reading_of(tmp_path, {**layout, key: nothing}).samples) == 1


def test_a_suffix_is_a_text_of_a_prompt_and_completion(tmp_path):
    with raises("data.key_of_another_format", "`suffix`"):
        reading_of(tmp_path, {**PAIR, "suffix": "end"})
    assert reading_of(tmp_path, {**PAIR, "suffix": ""}).samples
    assert reading_of(tmp_path, {**TURNS, "suffix": "end"}).unread_keys == {"suffix": 1}


@pytest.mark.parametrize(
    "note",
    [
        {"num_tools": 2}, {"operating_system": "linux"}, {"system_fingerprint": "fp"}, {"reasoning_model": "x"},
        {"developer": "x"}, {"thinking_tokens": 5}, {"has_reasoning": True}, {"system_prompt_id": 3}, {"cot": "Hello"},
        {"systemPrompt": "Hi"}, {"score_rejected": 8.5}, {"rejected_model": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_note_about_such_a_text_or_a_copy_of_one_passes(tmp_path, note):
    assert reading_of(tmp_path, {**TURNS, **note}).unread_keys == dict.fromkeys(note, 1)


def test_plain_text_may_have_what_it_was_made_of(tmp_path):
    extra = {"label": 0, "tools": ["x"], "systemPrompt": "x", "reasoning": "x"}
    assert reading_of(tmp_path, {"text": "Hi", **extra}).unread_keys == dict.fromkeys(extra, 1)


@pytest.mark.parametrize(
    "extra",
    [
        {key: nothing}
        for key in ("images", "tools", "system_prompt", "chosen", "rejected", "label", "text", "mask", "chat_template_kwargs")
        for nothing in (None, "", [], {}, "null", "[]", [None], {"thinking": None}, [{"a": None, "b": []}])
        if key != "text" or not nothing
    ]
    + [{"loss": True}, {"weight": 1}, {"weight": "1.0"}, {"label": "True"}, {"loss_scale": 1.0}, {"mask": False}],
    ids=str,
)
def test_a_value_that_asks_for_nothing_passes(tmp_path, extra):
    (sample,) = reading_of(tmp_path, {**TURNS, **extra}).samples
    assert [turn.text for turn in sample.turns] == ["Hi", "Hello."]


def test_arrow_gives_every_row_all_keys(tmp_path):
    """What one sample asks for is a null in the others."""
    turns = [
        {**MESSAGES[0], "train": None, "info": None}, {**MESSAGES[1], "train": False, "info": {"a": None}}, *MESSAGES
    ]  # fmt: skip
    reading = reading_of(tmp_path, {"messages": turns, "images": ["a"][:0]}, {**TURNS, "source": "x"}, parquet=True)
    assert [turn.left_out_of_loss for turn in reading.samples[0].turns] == [False, True, False, False]
    assert [turn.left_out_of_loss for turn in reading.samples[1].turns] == [False, False]
    with raises("data.key_of_another_format", "sample 2", "images"):
        reading_of(tmp_path, {**TURNS, "images": []}, {**TURNS, "images": ["a.png"]}, parquet=True)


@pytest.mark.parametrize("key", ["text", "instruction", "chosen", "rejected", "prompt"])
def test_the_format_that_is_asked_for_settles_other_texts(tmp_path, key):
    sample = {**TURNS, key: "other"}
    reading = reading_of(tmp_path, sample, data_format="messages")
    assert reading.unread_keys == {key: 1}
    code = "data.several_formats" if key == "text" else "data.key_of_another_format"
    with raises(code, f"`{key}`", "--data_format messages"):
        reading_of(tmp_path, sample)


@pytest.mark.parametrize(
    ("sample", "names"),
    [
        ({**TURNS, "text": "a"}, ("messages", "text")),
        ({**TURNS, "conversations": SHAREGPT}, ("sharegpt", "messages")),
        ({**TURNS, **PAIR}, ("messages", "prompt_completion")),
        ({**ALPACA, "text": "a"}, ("alpaca", "text")),
        ({**ALPACA, **PAIR}, ("alpaca", "prompt_completion")),
    ],
    ids=lambda value: "+".join(value),
)
def test_two_formats_in_a_sample_are_both_named(tmp_path, sample, names):
    with raises("data.several_formats", *names):
        reading_of(tmp_path, sample)
    for name in names:
        assert reading_of(tmp_path, sample, data_format=name).unread_keys


def test_a_copy_of_a_text_that_is_read_is_no_other_text(tmp_path):
    """As `prompt` in UltraChat and No Robots."""
    sample = {"prompt": " Hi\n", "prompt_id": "1", "messages": MESSAGES}
    assert reading_of(tmp_path, sample).unread_keys == {"prompt": 1, "prompt_id": 1}


def test_a_text_that_renders_the_rest_is_no_other_text(tmp_path):
    """As `text` in Stanford's Alpaca."""
    sample = {"instruction": "Add.", "input": "1 2", "output": "3"}
    rendering = "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"
    assert reading_of(tmp_path, {**sample, "text": rendering}).unread_keys == {"text": 1}
    for other in (rendering.replace("3", "4"), rendering.replace("Add.", ""), "3 1 2 Add."):
        with raises("data.several_formats", "of 2"):
            reading_of(tmp_path, {**sample, "text": other})


def test_notes_are_named_in_the_log_with_their_count(tmp_path):
    path = tmp_path / "data.json"
    notes = {"id": "1", "source": "web", "language": "en", "num_images": 3, "my_note": {"a": [1]}}
    turns = [{**MESSAGES[0], "timestamp": 7}, MESSAGES[1]]
    path.write_text(json.dumps([{"messages": turns, **notes}, {**TURNS, "source": "book"}, TURNS, {"text": "a", "label": 0}]))
    lines = prepare(path, byte_tokenizer(CHATML), model_max_length=200).lines()
    (line,) = [line for line in lines if line.startswith("keys that are not read")]
    assert line == (
        "keys that are not read: source (2 samples), messages.timestamp (1 sample), language (1 sample), "
        "num_images (1 sample), my_note (1 sample), label (1 sample)"
    )


@pytest.mark.parametrize(
    ("marks", "trained"),
    [
        ({"loss": False}, False), ({"loss": "false"}, False), ({"loss": 0}, False), ({"loss": True}, True),
        ({"loss_scale": 0}, False), ({"loss_scale": 0.0}, False), ({"loss_scale": "1"}, True), ({"weight": "0"}, False),
        ({"train": "False"}, False), ({"train": "true"}, True), ({"mask": True}, False), ({"mask": "true"}, False),
        ({"mask": False}, True), ({"loss": None, "weight": None, "mask": None, "train": None}, True),
        ({"train": False, "loss": False}, False), ({"train_detail": []}, True), ({"train_detail": None}, True),
    ],
    ids=str,
)  # fmt: skip
def test_an_answers_marks_are_read(tmp_path, marks, trained):
    (sample,) = reading_of(tmp_path, answer(**marks)).samples
    assert sample.turns[1].left_out_of_loss is not trained


@pytest.mark.parametrize(
    ("code", "marks"),
    [
        *(("bad_value_of_key", marks) for marks in (
            {"loss": 0.5}, {"loss_scale": 2}, {"weight": "half"}, {"train": "no"}, {"mask": 1}, {"mask": [0, 1]},
        )),
        *(("key_refused", marks) for marks in (
            {"loss_mask": 0}, {"trainable": False},
            {"ignore": True}, {"images": ["a.png"]}, {"name": "Bob"}, {"chosen": "x"}, {"my_note": "x"}, {"label": False},
        )),
        *(("bad_train_detail", {"train_detail": detail}) for detail in (
            [{"begin_offset": 0, "end_offset": 6, "train": True}], [{"begin_offset": 1, "train": True}], "x", [[0, 1]],
            [{"begin_offset": 2, "end_offset": 1, "train": True}], [{"begin_offset": 0, "end_offset": 3, "train": "x"}],
            [{"begin_offset": 0, "end_offset": 3, "train": True}, {"begin_offset": 3, "end_offset": 4, "train": False}],
        )),
        ("contradicting_keys", {"train": True, "weight": 0}), ("contradicting_keys", {"loss_scale": 0.5, "weight": 0.4}),
    ],
    ids=str,
)  # fmt: skip
def test_a_turns_other_marks_are_refused(tmp_path, code, marks):
    with raises(f"data.{code}", "sample 1, turn 2", *marks):
        reading_of(tmp_path, answer(**marks))


@pytest.mark.parametrize("mark", ["train", "loss"])
def test_a_question_that_is_to_be_trained_on_is_refused(tmp_path, mark):
    with raises("data.only_answers_are_trained_on", "turn 1"):
        reading_of(tmp_path, {"messages": [{**MESSAGES[0], mark: True}, MESSAGES[1]]})
    assert reading_of(tmp_path, {"messages": [{**MESSAGES[0], mark: False, "weight": 1}, MESSAGES[1]]}).samples


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "turn_without_text"),
        ([{"type": "image", "image": "a.png"}], "turn_not_only_text"),
        ([{"type": "text", "text": "Hi", "image": "a.png"}], "turn_not_only_text"),
        ([{"type": "text", "text": None}], "turn_not_only_text"),
        (7, "turn_text_is_no_text"),
    ],
)
def test_content_that_is_not_a_text_comes_with_its_remedy(tmp_path, content, code):
    with raises(f"data.{code}", "sample 1, turn 1", str(content).strip("[]")):
        reading_of(tmp_path, {"messages": [{"role": "user", "content": content}, MESSAGES[1]]})


@pytest.mark.parametrize("tail", [["user"], ["user", "user"], ["user", "user", "user"], ["tool"], ["user", "tool"]])
def test_what_follows_the_last_answer_is_dropped(tmp_path, tail):
    sample = {"messages": [*MESSAGES, *({"role": role, "content": "x"} for role in tail)]}
    reading = reading_of(tmp_path, sample)
    assert [turn.text for turn in reading.samples[0].turns] == ["Hi", "Hello."]
    assert reading.dropped_turns[UNANSWERED] == len(tail)


HOSTILE = ("note\ud800", "note\x1b[31m", "note\nerror: fake", "note\u2028x", "note\u202ex", "note\r", "note" * 1000)
SURELY_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")


def require_safe(text):
    text.encode()
    assert not SURELY_UNSAFE.search(text)
    assert not any(line.startswith("error: fake") for line in text.splitlines())
    assert len(text) < 1500, "an excerpt, not the whole"


@pytest.mark.parametrize("key", HOSTILE)
def test_what_comes_from_the_data_is_escaped_where_it_is_printed(tmp_path, key):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**TURNS, key: 1}]))
    for line in prepare(path, byte_tokenizer(CHATML), model_max_length=200).lines():
        require_safe(line)
        assert "\n" not in line
    bad = [
        {**TURNS, f"images{key}_img": "x"}, {**TURNS, f"loss_{key}": 0}, {**TURNS, "loss": key}, answer(**{key: 1}),
        answer(**{f"loss_{key}": 1}), answer(loss=key), {key: 1}, {key: [TURNS]}, {"messages": [key]},
        {"messages": [{"role": key}]},
        {"messages": [{"role": key, "content": "x"}]}, {"prompt": [key], "completion": "x"}, {**ALPACA, "history": key},
        {"id": key, "messages": 5}, {**ALPACA, "history": [[key, 5]]}, key, {"messages": key},
    ]  # fmt: skip
    for sample in bad:
        with pytest.raises(DataError) as caught:
            reading_of(tmp_path, sample)
        require_safe(str(caught.value))
        assert "\n" not in str(caught.value), sample
    path.write_text(f'[{{"messages": [], {json.dumps(key)}: 1, {json.dumps(key)}: 2}}]')
    with pytest.raises(DataError) as caught:
        prepare(path, byte_tokenizer(CHATML), model_max_length=200)
    require_safe(str(caught.value))
