"""Columns of other names, tables, and samples that are tokenised already."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.tiny import CHATML, byte_tokenizer, make_pipeline, prepare, trained_text
from tests.errors import raises
from zero_sft.data.dataset import prepare_source
from zero_sft.data.samples.assemble import ReadOptions
from zero_sft.data.samples.columns import parse_columns
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.samples.sample_formats import FORMAT_KEYS, read_sample
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.tokenize import WEIGHTS, TokenizedSample


def options(text, **more):
    return ReadOptions(columns=parse_columns(text, FORMAT_KEYS), **more)


def rows_of(path, columns=None, **more):
    parser = SampleParser(options=options(columns))
    return prepare(path, byte_tokenizer(CHATML), model_max_length=200, parser=parser, **more).rows


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("columns", "sample", "same"),
    [
        ("prompt=question,completion=answer", {"question": "Hi", "answer": "Hello."}, {"prompt": "Hi", "completion": "Hello."}),
        ("instruction = q, output = a.text", {"q": "Hi", "a": {"text": "Hello."}}, {"instruction": "Hi", "output": "Hello."}),
        ("messages=conversation.turns", {"conversation": {"turns": TALK}}, {"messages": TALK}),
        ("messages=a.b", {"a.b": TALK, "a": 5}, {"messages": TALK}),
        (
            "messages=dialog,role=speaker,content=said",
            {"dialog": [{"speaker": "user", "said": "Hi"}, {"speaker": "assistant", "said": "Hello."}]}, {"messages": TALK},
        ),
        (
            "role=speaker",
            {"conversations": [{"speaker": "user", "content": "Hi"}, {"speaker": "assistant", "content": "Hello."}]},
            {"messages": TALK},
        ),
        ("text=body,weight=w", {"body": "Hello.", "w": 0.5}, {"text": "Hello.", "weight": 0.5}),
        ("system=s,messages=m", {"s": "Be brief.", "m": TALK}, {"system": "Be brief.", "messages": TALK}),
    ],
)  # fmt: skip
def test_columns_are_renamed(columns, sample, same):
    _, parsed = read_sample(sample, "here", options(columns))
    assert parsed.sample == read_sample(same, "here")[1].sample


def test_what_is_wrong_with_columns():
    for text in ("prompt", "prompt=", "=question", "prompt=a,prompt=b", "prompt=a..b"):
        with raises("data.bad_columns", text):
            parse_columns(text, FORMAT_KEYS)
    with raises("data.unknown_column", "'question'", "completion", "role or content"):
        parse_columns("question=prompt", FORMAT_KEYS)
    with raises("data.column_missing", "here", "`turns`", "id"):
        read_sample({"chat": {"id": 1}}, "here", options("messages=chat.turns"))
    with raises("data.column_missing", "here", "`question`"):
        read_sample({"q": "Hi"}, "here", options("prompt=question,completion=answer"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
def test_tables(tmp_path, ending):
    separator = "\t" if ending == "tsv" else ","
    text = separator.join(("question", "answer", "source")) + "\r\n"
    text += separator.join(('"Hi, ""you""\nthere"', "Hello.", "web")) + "\r\n" + separator.join(("二", '""', "")) + "\n"
    path = tmp_path / f"data.{ending}"
    data = ("\ufeff" + text).encode()
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    lines = tmp_path / "data.jsonl"
    lines.write_text(json.dumps({"prompt": 'Hi, "you"\nthere', "completion": "Hello."}))
    (row,), (expected,) = rows_of(path, "prompt=question,completion=answer"), rows_of(lines)
    assert row["input_ids"] == expected["input_ids"]
    assert row["labels"] == expected["labels"]


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        ("prompt,completion\na,b\nc,d,e\n", "bad_table_row", ["line 3", "3 values", "2 columns"]),
        ("prompt,completion\na\n", "bad_table_row", ["line 2", "1 values"]),
        ('prompt,completion\na,"b\n', "bad_table", ["line 2", "CSV"]),
        ("prompt,prompt\na,b\n", "duplicate_columns", ["prompt, prompt"]),
        ("", "empty_file", []),
        ("q,a\nb,c\n", "unknown_format", ["line 2", "'q', 'a'"]),
    ],
)
def test_bad_tables(tmp_path, text, code, values):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with raises(f"data.{code}", str(path), *values):
        rows_of(path)


def test_a_long_text_in_a_table(tmp_path):
    """Longer than Python's default for a field."""
    path = tmp_path / "data.csv"
    path.write_text(f"prompt,completion\na,{'b' * 200_000}\n")
    (row,) = rows_of(path)
    assert len(row["input_ids"]) == 200


def test_a_table_next_to_other_data_is_left_out(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "Hello."}))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    prepared = prepare(tmp_path, byte_tokenizer(), model_max_length=100)
    assert len(prepared.rows) == 1
    assert "1 other file in it left out: notes.csv" in prepared.lines()
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "notes.csv").write_text("text\nHello.\nBye.\n")
    assert len(rows_of(tmp_path)) == 2


IDS = [70, 71, 72, 73]


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"labels": [-100, -100, 72, 73]}, [-100, -100, 72, 73]),
        ({"labels": IDS}, [-100, 71, 72, 73]),
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 72, 73]),
        ({"completion_mask": [False, False, True, True]}, [-100, -100, 72, 73]),
        ({"assistant_masks": [0, 1, 0, 1], "attention_mask": [1] * 4, "length": 4}, [-100, 71, -100, 73]),
        ({}, [-100, 71, 72, 73]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tokens(tmp_path, keys, labels, kind):
    path = tmp_path / f"data.{kind}"
    sample = {"input_ids": IDS, **keys}
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([sample]), path)
    else:
        path.write_text(json.dumps(sample))
    for lazy in (False, True):
        (row,) = rows_of(path, embedding_rows=200, lazy=lazy)
        assert row["input_ids"] == IDS
        assert row["labels"] == labels


def test_tokens_are_truncated_and_weighted():
    pipeline = make_pipeline(byte_tokenizer(), model_max_length=3)
    batch = pipeline.make_rows([({"input_ids": IDS, "labels": [-100, *IDS[1:]], "weight": 0.5}, "here")])
    (row,) = batch.rows.to_pylist()
    assert row["input_ids"] == IDS[:3]
    assert row[WEIGHTS] == [0, 0.5, 0.5]
    assert batch.report.cut_tokens == batch.report.cut_trained_tokens == 1


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"input_ids": IDS, "labels": [71, 72, 73, -100]}, "labels_are_not_the_ids"),
        ({"input_ids": IDS, "labels": IDS[:3]}, "lengths_differ"),
        ({"input_ids": IDS, "completion_mask": [0, 2, 1, 1]}, "labels_are_not_the_ids"),
        ({"input_ids": IDS, "labels": IDS, "completion_mask": [0, 1, 1, 1]}, "labels_twice"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 1, 0]}, "padded_tokens"),
        ({"input_ids": ["a"]}, "not_token_ids"),
        ({"input_ids": [True, False]}, "not_token_ids"),
        ({"input_ids": [1, 999]}, "token_without_embedding"),
        ({"input_ids": [1, -1]}, "token_without_embedding"),
        ({"input_ids": IDS, "pixel_values": [1]}, "key_of_another_format"),
    ],
)
def test_bad_tokens(tmp_path, sample, code):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample]))
    with raises(f"data.{code}", "sample 1"):
        rows_of(path, embedding_rows=200)


def test_tokens_next_to_texts(tmp_path):
    """In one file, a sample of each kind."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"messages": TALK}, {"input_ids": IDS}, {"text": "Bye."}]))
    rows = rows_of(path, embedding_rows=300)
    tokenizer = byte_tokenizer(CHATML)
    texts = [
        trained_text(TokenizedSample(input_ids=row["input_ids"], labels=row["labels"], trained_tokens=0), tokenizer)
        for row in (rows[0], rows[2])
    ]
    assert texts == [["Hello.<|im_end|>"], ["Bye.</s>"]]
    assert rows[1]["input_ids"] == IDS


def test_tokens_that_were_prepared_for_a_larger_model(tmp_path):
    """The rows are found again, but not taken."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"input_ids": [1, 150]}]))
    pipelines = [make_pipeline(byte_tokenizer(), model_max_length=100, embedding_rows=rows) for rows in (200, 100)]
    prepare_source(LocalFiles(path=path), pipelines[0], tmp_path / "cache")
    with raises("data.token_without_embedding", "150", "100 rows"):
        prepare_source(LocalFiles(path=path), pipelines[1], tmp_path / "cache")
