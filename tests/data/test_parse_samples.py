"""`zero_sft.data.samples.parse`: what is read, what is dropped and counted, and what is wrong with a file."""

import bz2
import gzip
import json
import lzma
import os
from typing import get_args

import pytest

from tests.data.tiny import byte_tokenizer, prepare
from tests.errors import raises
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.conversation import LEADING, UNANSWERED, Conversation, PromptCompletion, Turn
from zero_sft.data.samples.parse import DEFAULT_PARSER, SampleParser
from zero_sft.data.samples.sample_formats import SAMPLE_FORMATS, DataFormat
from zero_sft.data.sources.data_path import parse_sources
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.packaged_file import packaged_file

ONE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
TURNS = (Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello."))
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def written(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def assert_refused(path, code, *values):
    with raises(f"data.{code}", *values):
        DEFAULT_PARSER.read(LocalFiles(path=path).objects())


@pytest.mark.parametrize("sample", [{"id": "a", "conversations": ONE}, {"id": "a", "messages": MESSAGES}])
@pytest.mark.parametrize("lines", [False, True])
def test_both_layouts_as_list_and_as_lines(tmp_path, sample, lines):
    content = "\n".join([json.dumps(sample), "", json.dumps(sample)]) + "\n" if lines else [sample, sample]
    path = written(tmp_path, content)
    reading = DEFAULT_PARSER.read(LocalFiles(path=path).objects())
    assert [each.turns for each in reading.samples] == [TURNS, TURNS]
    assert reading.formats == ("sharegpt" if "conversations" in sample else "messages",)
    assert [each.where for each in reading.samples] == (
        [f"{path}, line 1 (id 'a')", f"{path}, line 3 (id 'a')"]
        if lines
        else [f"{path}, sample 1 (id 'a')", f"{path}, sample 2 (id 'a')"]
    )


def test_the_text_is_kept_as_it_is(tmp_path):
    text = " 你好 😀\u2028\r\n\ttab  "
    path = written(tmp_path, json.dumps({"messages": [{"role": "user", "content": text}, *MESSAGES[1:]]}, ensure_ascii=False))
    assert DEFAULT_PARSER.read(LocalFiles(path=path).objects()).samples[0].turns[0].text == text


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        ("\ufeff" + json.dumps({"conversations": ONE}) + "\r\n" + json.dumps({"messages": MESSAGES}) + "\r\n").encode()
    )
    reading = DEFAULT_PARSER.read(LocalFiles(path=path).objects())
    assert [each.turns for each in reading.samples] == [TURNS, TURNS]
    assert reading.formats == ("messages", "sharegpt")


def test_leading_and_unanswered_turns_are_dropped_and_counted(tmp_path):
    gpt, human = {"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}
    system = {"from": "system", "value": "Be brief."}
    samples = [[gpt, *ONE], [*ONE, human], [gpt, *ONE, human], [system, gpt, *ONE], [system], [gpt], [human], []]
    reading = DEFAULT_PARSER.read(LocalFiles(path=written(tmp_path, [{"conversations": each} for each in samples])).objects())
    brief = Turn(role="system", text="Be brief.")
    assert [each.turns for each in reading.samples] == [TURNS, TURNS, TURNS, (brief, *TURNS), (brief,), (), (), ()]
    assert reading.dropped_turns == {LEADING: 4, UNANSWERED: 3}


def test_every_format_can_be_named():
    assert get_args(DataFormat) == tuple(SAMPLE_FORMATS)


def test_the_shipped_samples_are_read():
    reading = DEFAULT_PARSER.read(LocalFiles(path=packaged_file("examples", "conversations.json")).objects())
    assert len(reading.samples) == 100
    assert reading.dropped_turns == {}


def test_a_line_that_breaks_off_has_its_own_number(tmp_path):
    path = written(tmp_path, '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n', "data.jsonl")
    assert_refused(path, "not_json", "line 2", "column 13")


def test_numbers_that_python_does_not_read(tmp_path):
    path = written(tmp_path, '{"text": "x", "n": ' + "9" * 5000 + "}", "data.jsonl")
    assert_refused(path, "bad_json_value", "line 1", "thousands of digits", "as text")


def test_a_place_is_named_once(tmp_path):
    path = written(tmp_path, '{"text": "a\tb"}', "data.jsonl")
    with raises("data.not_json", "line 1", "invalid control character, at column 12;"):
        DEFAULT_PARSER.read(LocalFiles(path=path).objects())


def test_missing_empty_and_unreadable_files(tmp_path):
    assert_refused(tmp_path / "none.json", "no_such_file", "none.json")
    assert_refused(tmp_path, "no_data_files", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert_refused(tmp_path, "no_data_files", "a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "not_a_regular_file", "pipe")
    for content in ("", " \n\n"):
        assert_refused(written(tmp_path, content), "empty_file")
    for empty, code in (("[]", "data.no_samples"), ("{broken", "data.not_json")):
        with raises(code):
            prepare(written(tmp_path, empty), byte_tokenizer(), model_max_length=64)
    (tmp_path / "latin.json").write_bytes(b'[{"conversations": "\xe9"}]')
    assert_refused(tmp_path / "latin.json", "not_utf8")


@pytest.mark.parametrize(
    ("content", "code", "values"),
    [
        ("hello", "not_json", ["line 1", "got 'hello'"]),
        ('[{"conversations": []},\n{"conversations": [}]', "not_json", ["line 2"]),
        (json.dumps({"conversations": ONE}) + "\n{'id': 1}\n", "not_json", ["line 2"]),
        ('[{"conversations": []}', "not_json", ["line 1", "got the end"]),
        ("[" * 100_000, "json_nested_too_deep", []),
        ('"text"', "sample_not_an_object", ["line 1", "got str"]),
        ([["a"]], "sample_not_an_object", ["sample 1", "got list"]),
        ([{"id": 7, "body": "x"}], "unknown_format", ["sample 1 (id 7)", "the keys 'id', 'body'"]),
        ([{"conversations": "x"}], "turns_not_a_list", ["`conversations`", "got a text", '{"from": ..., "value": ...}']),
        ([{"messages": json.dumps(MESSAGES)}], "turns_not_a_list", ["`messages`", "got a text", '{"role": ..., "content":']),
        ([{"conversations": {}}], "turns_not_a_list", ["`conversations`", "got dict"]),
        ([{}], "unknown_format", ["sample 1", "without keys"]),
        ([{"dialog": ONE}], "unknown_format", ["'dialog'", "rename", "`conversations`"]),
        ([{"id": 1, "turns": MESSAGES}], "unknown_format", ["`turns`", "rename", "`messages`"]),
        ([{"conversations": [{"from": "human"}]}], "turn_without_text", ["turn 1", '"value"', "got {'from': 'human'}"]),
        ([{"conversations": [{"speaker": "user", "content": "x"}]}], "bad_turn", ["turn 1", '"from"']),
        ([{"messages": [{"role": "user", "content": [7]}]}], "turn_not_only_text", ["turn 1, part 1", "got 7"]),
        ([{"messages": [{"role": "user", "content": None}]}], "turn_without_text", ["turn 1", "None"]),
        ([{"conversations": ["x"]}], "bad_turn", ["turn 1", "got x"]),
        ([{"conversations": [{"from": "robot", "value": "x"}]}], "unknown_role", ["'robot'", "user, human, assistant, gpt"]),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "unknown_role", ["'robot'", "user, human"]),
        (
            [{"id": "z", "conversations": [*ONE, ONE[1]]}],
            "roles_do_not_alternate",
            ["(id 'z'), turn 3", "expected human or tool, got gpt"],
        ),
        ([{"conversations": [ONE[0], ONE[0]]}], "roles_do_not_alternate", ["turn 2", "expected gpt, got human"]),
        ([{"conversations": [ONE[1], ONE[1]]}], "roles_do_not_alternate", ["turn 2", "expected human, got gpt"]),
        ([{"messages": [*MESSAGES, {"role": "system", "content": ""}]}], "roles_do_not_alternate", ["turn 3", "got system"]),
        (
            [{"messages": [MESSAGES[0], {"role": "system", "content": "x"}]}],
            "roles_do_not_alternate",
            ["expected assistant, got system"],
        ),
        ([{"messages": [MESSAGES[0], {"role": "tool", "content": "x"}]}], "roles_do_not_alternate", ["got tool"]),
        ([{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}], "key_of_another_format", ["sample 1: `tools`"]),
        ([{"conversations": ONE, "history": [["a", "b"]]}], "key_of_another_format", ["`history`", "sharegpt"]),
        ([{"prompt": "a", "completion": "b", "system": "c"}], "key_of_another_format", ["`system`", "prompt_completion"]),
        ([{"messages": [{"role": "system", "content": "x"}, *MESSAGES], "system": "y"}], "second_system_text", []),
        ([{"instruction": "a", "output": 0}], "not_a_text", ["`output`", "got 0"]),
        ([{"instruction": "a", "input": [], "output": "b"}], "not_a_text", ["`input`", "got []"]),
        ([{"instruction": "a", "input": False, "output": "b"}], "not_a_text", ["`input`", "got False"]),
        ([{"instruction": "a", "output": "b", "history": [["c"]]}], "bad_history", ["`history`"]),
        ([{"messages": [{**MESSAGES[0], "function_call": {"name": "f"}}]}], "key_refused", ["turn 1: `function_call`"]),
        ('{"text": "a", "text": "b"}', "bad_json_value", ["line 1", "'text'"]),
        (
            [{"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}],
            "bad_call",
            ["turn 2, `tool_calls`, call 1", "got 1"],
        ),
        ([{"instruction": "a", "output": None}], "unknown_format", ["the keys 'instruction', 'output' (null)"]),
        ([{"messages": [{"role": "system", "content": "x"}] * 2 + MESSAGES}], "second_system_text", ["turn 2"]),
        ("a,b\n1,2\n", "not_json", ["line 1"]),
        ('{\n "data": []\n}', "object_over_lines", []),
        ('[{"conversations": [{"from": "human", "value": "\\ud800"}]}]', "lone_surrogate", ["turn 1"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, code, values):
    path = written(tmp_path, content)
    assert_refused(path, code, str(path), *values)


def talk(*texts):
    return tuple(Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(texts))


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, talk("Add.\n\n1 2", "3")),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, TURNS),
        ({"instruction": "Hi", "output": "Hello."}, TURNS),
        ({"system": "Be.", "instruction": "Hi", "output": "x"}, (Turn(role="system", text="Be."), *talk("Hi", "x"))),
        (
            {"prompt": [*MESSAGES, MESSAGES[0]], "completion": MESSAGES[1:]},
            (TURNS[0], Turn(role="assistant", text="Hello.", weight=0.0), *TURNS),
        ),
        ({"conversations": [{"from": "user", "value": "Hi"}, {"from": "bing", "value": "Hello."}]}, TURNS),
        (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "train": False}, MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES]},
            (*2 * (TURNS[0], Turn(role="assistant", text="Hello.", weight=0.0)), *TURNS),
        ),
        (
            {"messages": [*MESSAGES, {"role": "tool", "content": "7"}, {"role": "tool", "content": "8"}, MESSAGES[1]]},
            (*TURNS, Turn(role="tool", text="7"), Turn(role="tool", text="8"), TURNS[1]),
        ),
    ],
)  # fmt: skip
def test_other_layouts(tmp_path, sample, expected):
    path = written(tmp_path, [sample])
    (only,) = DEFAULT_PARSER.read(LocalFiles(path=path).objects()).samples
    assert isinstance(only, Conversation)
    assert tuple(turn if turn.role == "assistant" else Turn(role=turn.role, text=turn.text) for turn in only.turns) == expected


def test_plain_text_is_taken_as_it_is(tmp_path):
    path = written(tmp_path, [{"prompt": "2+2=", "completion": "4"}, {"text": " a\n"}])
    first, second = DEFAULT_PARSER.read(LocalFiles(path=path).objects()).samples
    assert first == PromptCompletion(prompt="2+2=", completion="4", where=f"{path}, sample 1")
    assert second == PromptCompletion(prompt="", completion=" a\n", where=f"{path}, sample 2")


def test_a_layout_can_be_forced(tmp_path):
    both = {"conversations": ONE, "text": "x"}
    path = written(tmp_path, [both, {"text": "y"}])
    assert_refused(path, "several_formats", "sample 1", "`conversations` of sharegpt", "`text` of text")
    reading = SampleParser(options=ReadOptions(data_format="text")).read(LocalFiles(path=path).objects())
    assert [each.completion for each in reading.samples] == ["x", "y"]
    assert reading.unread_keys == {"conversations": 1}, "said in the log"
    with raises("data.unknown_format", "sample 2", "--data_format sharegpt", "'text'"):
        SampleParser(options=ReadOptions(data_format="sharegpt")).read(LocalFiles(path=path).objects())


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_compressed_lines(tmp_path, module):
    ending = {"gzip": ".gz", "bz2": ".bz2", "lzma": ".xz"}[module.__name__]
    path = tmp_path / "data" / f"a.jsonl{ending}"
    path.parent.mkdir()
    path.write_bytes(module.compress("\n".join([json.dumps({"messages": MESSAGES})] * 50).encode()))
    assert len(DEFAULT_PARSER.read(LocalFiles(path=path.parent).objects()).samples) == 50
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    assert_refused(path, "bad_compression")
    path.write_bytes(b"no such thing" + whole)
    assert_refused(path, "bad_compression")


def test_what_a_folder_has_besides_is_named(tmp_path):
    written(tmp_path, [{"conversations": ONE}])
    for name in ("README.md", "more.txt", ".hidden"):
        (tmp_path / name).write_text("x")
    prepared = prepare(tmp_path, byte_tokenizer(), model_max_length=500)
    assert "2 other files in it left out: README.md, more.txt" in prepared.lines()


def test_parquet_and_folders(tmp_path):
    import datasets

    folder = tmp_path / "many"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    rows = [{"id": "a", "messages": MESSAGES}, {"id": "b", "messages": [{**MESSAGES[0], "train": False}, MESSAGES[1]]}]
    datasets.Dataset.from_list(rows).to_parquet(folder / "b.parquet")
    written(folder, [{"conversations": ONE}], "a.json")
    written(folder / "inner", json.dumps({"text": "x"}), "c.jsonl")
    written(folder / ".hidden", "broken", "d.json")
    (folder / "notes.md").write_text("no data")
    reading = DEFAULT_PARSER.read(LocalFiles(path=folder).objects())
    assert [each.where for each in reading.samples] == [
        f"{folder}/a.json, sample 1", f"{folder}/b.parquet, sample 1 (id 'a')", f"{folder}/b.parquet, sample 2 (id 'b')",
        f"{folder}/inner/c.jsonl, line 1",
    ]  # fmt: skip
    assert [each.turns for each in reading.samples[:2]] == [TURNS, TURNS]
    (folder / "b.parquet").write_bytes(b"PAR1 no")
    assert_refused(folder, "bad_parquet", "b.parquet")


def test_bad_samples_are_skipped_and_told(tmp_path):
    lines = [json.dumps({"conversations": ONE}), "{broken", json.dumps({"conversations": [ONE[0], ONE[0]]}), '{"text": 3}']
    path = written(tmp_path, "\n".join(lines), "data.jsonl")
    assert_refused(path, "not_json", "line 2")
    reading = SampleParser(on_bad_sample="skip").read(LocalFiles(path=path).objects())
    assert [each.turns for each in reading.samples] == [TURNS]
    assert [each.split(":")[0].removeprefix(f"{path}, ") for each in reading.bad] == ["line 2", "line 3, turn 2", "line 4"]
    with raises("data.all_samples_bad", "but 1", "line 1"):
        prepare(
            written(tmp_path, "{broken", "bad.jsonl"),
            byte_tokenizer(),
            model_max_length=64,
            parser=SampleParser(on_bad_sample="skip"),
        )


@pytest.mark.parametrize("turn", [{"train": "no"}, {"weight": 1.5}, {"cot": "hm"}])
def test_turns_that_would_be_trained_on_wrongly(tmp_path, turn):
    (key,) = turn
    code = "bad_value_of_key" if key in ("train", "weight") else "key_refused"
    assert_refused(written(tmp_path, [{"messages": [MESSAGES[0], {**MESSAGES[1], **turn}]}]), code, key)


def only_sample(tmp_path, sample):
    (found,) = DEFAULT_PARSER.read(LocalFiles(path=written(tmp_path, [sample])).objects()).samples
    return found


@pytest.mark.parametrize("turns", [{"conversations": ONE}, {"messages": MESSAGES}, {"instruction": "Hi", "output": "Hello."}])
def test_a_system_text_beside_the_turns(tmp_path, turns):
    system = Turn(role="system", text="Be brief.")
    assert only_sample(tmp_path, {**turns, "system": "Be brief."}).turns == (system, *TURNS)
    for nothing in (None, ""):
        assert only_sample(tmp_path, {**turns, "system": nothing, "tools": nothing}).turns == TURNS
    assert only_sample(tmp_path, {**turns, "tools": "[]", "history": []}).turns == TURNS


def test_alpacas_history_comes_first(tmp_path):
    found = only_sample(tmp_path, {"instruction": "a", "input": "b", "output": "c", "history": [["Hi", "Hello."]]})
    assert found.turns == (*TURNS, Turn(role="user", text="a\n\nb"), Turn(role="assistant", text="c"))


def test_lists_that_are_empty_give_way(tmp_path):
    assert only_sample(tmp_path, {"conversations": [], "messages": MESSAGES}).turns == TURNS
    assert only_sample(tmp_path, {"conversations": []}).turns == ()


def test_a_folder_with_a_link_to_nothing_is_refused(tmp_path):
    written(tmp_path, [{"text": "a"}])
    (tmp_path / "gone.json").symlink_to(tmp_path / "elsewhere.json")
    assert_refused(tmp_path, "broken_link", "gone.json")


def test_a_link_upwards_is_not_followed(tmp_path):
    written(tmp_path, [{"text": "outside"}])
    inside = tmp_path / "data"
    inside.mkdir()
    written(inside, [{"text": "inside"}])
    (inside / "up").symlink_to("..")
    (inside / "self").symlink_to(".")
    assert [each.completion for each in DEFAULT_PARSER.read(LocalFiles(path=inside).objects()).samples] == ["inside"]


def test_a_folder_that_cant_be_read_is_refused(tmp_path, monkeypatch):
    """As root everything can be read, so the operating system's answer is put in."""
    (tmp_path / "closed").mkdir()
    written(tmp_path, [{"text": "a"}])
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert_refused(tmp_path, "folder_unreadable", "closed", "Permission denied")


def test_parquet_that_python_cant_hold(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    far = pyarrow.array([2**60], pyarrow.timestamp("ms"))
    parquet.write_table(pyarrow.table({"text": ["a"], "at": far}), path)
    assert_refused(path, "bad_parquet", "column")
    (tmp_path / "empty.parquet").touch()
    assert_refused(tmp_path / "empty.parquet", "bad_parquet", "Write it again.")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, path)
    assert_refused(path, "duplicate_columns", "text, text")
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\x00\x00\x00\x00\x01\x00\x00\x00"), pyarrow.py_buffer(b"\xff")]
    )
    parquet.write_table(pyarrow.table({"text": broken}), path)
    assert_refused(path, "bad_parquet")


def test_one_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "\\ud83d\\ude00"}\n')
    assert_refused(path, "not_utf8", "data.jsonl, line 2")
    reading = SampleParser(on_bad_sample="skip").read(LocalFiles(path=path).objects())
    assert ([each.completion for each in reading.samples], len(reading.bad)) == (["a", "😀"], 1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://example.org/a.jsonl", "Download it, or use one of s3://"),
        ("simplecache::https://example.org/a.jsonl:0.5,b.jsonl:0.5", "Download it"),
        ("https://huggingface.co/datasets/org/name/tree/main", "write org/name, or"),
        ("https://hf.co/datasets/org/name", "write org/name, or"),
        ("file:///data/a.jsonl", "Write /data/a.jsonl."),
        ("FILE:///data/a.jsonl", "Write /data/a.jsonl."),
    ],
)
def test_an_address_is_refused_with_what_is_read(text, shown):
    with raises("data.address_not_read", "://", shown):
        parse_sources(text)


@pytest.mark.parametrize(
    ("history", "shown"),
    [
        ([["q1", "a1"], ["q2", None]], ("pair 2 of `history`", "second text, the answer", "null")),
        ([[None, "a1"]], ("pair 1 of `history`", "first text, the question", "null")),
        ([["q1", 5]], ("pair 1 of `history`", "second text, the answer", "5")),
    ],
)
def test_a_missing_text_of_a_history_is_named(tmp_path, history, shown):
    with raises("data.bad_history", *shown):
        only_sample(tmp_path, {"instruction": "i", "output": "o", "history": history})
    only_sample(tmp_path, {"instruction": "i", "output": "o", "history": [["q", ""]]})


@pytest.mark.parametrize("key", ["prompt", "completion"])
@pytest.mark.parametrize("messages", [[{"role": "user", "content": "q"}], {"role": "assistant", "content": "a"}])
def test_messages_and_a_text_do_not_go_together(tmp_path, key, messages):
    with raises("data.prompt_and_completion_differ", f"`{key}`"):
        only_sample(tmp_path, {"prompt": "q", "completion": "a", key: messages})


@pytest.mark.parametrize("text", ["abc", "abc</s>", "abc</s>\n", "abc</s> \n\n", "abc \n"])
@pytest.mark.parametrize("prompt", [None, "q: "])
def test_plain_text_has_one_end(tmp_path, text, prompt):
    """White space behind it is not trained on, since the model stops before it."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": text} if prompt is None else {"prompt": prompt, "completion": text}]))
    tokenizer = byte_tokenizer()
    (row,) = prepare(path, tokenizer, model_max_length=100).rows
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert trained == (text if text.endswith(" \n") and "<" not in text else "abc") + "</s>"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row["input_ids"]) == f"<s>{prompt or ''}{text}" + "</s>" * ("</s>" not in text)
