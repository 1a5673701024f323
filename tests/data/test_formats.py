"""`zero_sft.data.formats`: what is read, what is dropped and counted, and what is wrong with a file."""

import json

import pytest

from zero_sft.data.formats import Turn, read_conversations
from zero_sft.errors import DataError
from zero_sft.shipped import shipped

ONE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
TURNS = (Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello."))
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def written(tmp_path, content, name="data.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(path) -> str:
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    return str(caught.value)


@pytest.mark.parametrize("sample", [{"id": "a", "conversations": ONE}, {"id": "a", "messages": MESSAGES}])
@pytest.mark.parametrize("lines", [False, True])
def test_both_layouts_as_list_and_as_lines(tmp_path, sample, lines):
    content = "\n".join([json.dumps(sample), "", json.dumps(sample)]) + "\n" if lines else [sample, sample]
    path = written(tmp_path, content)
    reading = read_conversations(path)
    assert [each.turns for each in reading.conversations] == [TURNS, TURNS]
    assert reading.layouts == (next(key for key in sample if key != "id"),)
    assert [each.where for each in reading.conversations] == (
        [f"{path}, line 1 (id 'a')", f"{path}, line 3 (id 'a')"]
        if lines
        else [f"{path}, sample 1 (id 'a')", f"{path}, sample 2 (id 'a')"]
    )


def test_the_text_is_kept_as_it_is(tmp_path):
    text = " 你好 😀\u2028\r\n\ttab  "
    path = written(tmp_path, json.dumps({"messages": [{"role": "user", "content": text}, *MESSAGES[1:]]}, ensure_ascii=False))
    assert read_conversations(path).conversations[0].turns[0].text == text


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        ("\ufeff" + json.dumps({"conversations": ONE}) + "\r\n" + json.dumps({"messages": MESSAGES}) + "\r\n").encode()
    )
    reading = read_conversations(path)
    assert [each.turns for each in reading.conversations] == [TURNS, TURNS]
    assert reading.layouts == ("conversations", "messages")


def test_leading_and_unanswered_turns_are_dropped_and_counted(tmp_path):
    gpt, human = {"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}
    system = {"from": "system", "value": "Be brief."}
    samples = [[gpt, *ONE], [*ONE, human], [gpt, *ONE, human], [system, gpt, *ONE], [system], [gpt], [human], []]
    reading = read_conversations(written(tmp_path, [{"conversations": each} for each in samples]))
    brief = Turn(role="system", text="Be brief.")
    assert [each.turns for each in reading.conversations] == [TURNS, TURNS, TURNS, (brief, *TURNS), (brief,), (), (), ()]
    assert (reading.leading_turns, reading.unanswered_turns) == (4, 3)


def test_the_shipped_samples_are_read():
    reading = read_conversations(shipped("examples", "conversations.json"))
    assert len(reading.conversations) == 100
    assert (reading.leading_turns, reading.unanswered_turns) == (0, 0)


def test_missing_empty_and_unreadable_files(tmp_path):
    assert "no such file" in refused(tmp_path / "none.json")
    assert "is a folder" in refused(tmp_path)
    for content in ("", " \n\n"):
        assert "is empty" in refused(written(tmp_path, content))
    assert "holds no samples" in refused(written(tmp_path, "[]"))
    (tmp_path / "latin.json").write_bytes(b'[{"conversations": "\xe9"}]')
    assert "not UTF-8" in refused(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("hello", ["line 1: not JSON", "got 'hello'"]),
        ('[{"conversations": []},\n{"conversations": [}]', ["line 2: not JSON", "column"]),
        (json.dumps({"conversations": ONE}) + "\n{'id': 1}\n", ["line 2: not JSON", "one JSON object a line"]),
        ('[{"conversations": []}', ["line 1: not JSON", "got the end"]),
        ("[" * 100_000, ["nested too deep"]),
        ('"text"', ["line 1", "got str"]),
        ([["a"]], ["sample 1", "got list"]),
        ([{"id": 7, "text": "x"}], ["sample 1 (id 7): neither `conversations` nor `messages`", "the keys 'id', 'text'"]),
        ([{"conversations": "x"}], ["`conversations` must be a list of turns; got str"]),
        ([{"conversations": [{"from": "human"}]}], ["turn 1", '"value"', "got {'from': 'human'}"]),
        ([{"conversations": [{"role": "user", "content": "x"}]}], ["turn 1", '"from"']),
        ([{"messages": [{"role": "user", "content": ["x"]}]}], ["turn 1", '"content"']),
        ([{"messages": [{"role": "user", "content": None}]}], ["turn 1", "None"]),
        ([{"conversations": ["x"]}], ["turn 1", "got x"]),
        ([{"conversations": [{"from": "robot", "value": "x"}]}], ["unknown role 'robot'", "human, gpt"]),
        ([{"messages": [{"role": "human", "content": "x"}]}], ["unknown role 'human'", "user, assistant"]),
        (
            [{"id": "z", "conversations": [*ONE, ONE[1]]}],
            ["(id 'z'), turn 3: roles must alternate; expected user, got assistant"],
        ),
        ([{"conversations": [ONE[0], ONE[0]]}], ["turn 2", "expected assistant, got user"]),
        ([{"conversations": [ONE[1], ONE[1]]}], ["turn 2", "expected user, got assistant"]),
        ([{"messages": [*MESSAGES, {"role": "system", "content": ""}]}], ["turn 3", "got system"]),
        ('[{"conversations": [{"from": "human", "value": "\\ud800"}]}]', ["turn 1", "surrogate"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, parts):
    path = written(tmp_path, content)
    message = refused(path)
    for part in (str(path), *parts):
        assert part in message, message
