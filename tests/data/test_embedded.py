"""A token without an embedding is found when the data is prepared, whatever brings it."""

import json

import pytest

from tests.data.tiny import CHATML, SPECIAL, byte_tokenizer, make_pipeline, prepare
from tests.errors import raises
from zero_sft.data.cache import key_of_rows
from zero_sft.data.samples.parse import SampleParser
from zero_sft.data.sources.local_files import LocalFiles

ROWS = len(SPECIAL) + 256


def tokenizer_with(*tokens, template=CHATML):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def written(tmp_path, *answers):
    path = tmp_path / "data.json"
    path.write_text(
        json.dumps([{"id": str(number), "instruction": "Hi", "output": each} for number, each in enumerate(answers)])
    )
    return path


@pytest.mark.parametrize("lazy", [False, True])
def test_token_and_sample_are_named(tmp_path, lazy):
    path, tokenizer = written(tmp_path, "a", "b", "c<|tool|>d"), tokenizer_with("<|x|>", "<|tool|>")
    options = {"model_max_length": 200, "lazy": lazy}
    with raises("data.token_without_embedding", "sample 3 (id '2')", "'<|tool|>'", f"{ROWS + 1}", f"{ROWS} rows"):
        prepare(path, tokenizer, embedding_rows=ROWS, **options)
    for rows in (ROWS + 2, None):
        assert len(prepare(path, tokenizer, embedding_rows=rows, **options).rows) == 3
    skipping = prepare(path, tokenizer, embedding_rows=ROWS, parser=SampleParser(on_bad_sample="skip"), **options)
    assert (len(skipping.rows), skipping.reports[0].bad) == (2, 1)


def test_a_token_of_the_template(tmp_path):
    tokenizer = tokenizer_with("<|new|>", template=CHATML.replace("<|im_end|>", "<|new|>"))
    with raises("data.token_without_embedding", "sample 1", "'<|new|>'"):
        prepare(written(tmp_path, "a"), tokenizer, embedding_rows=ROWS, model_max_length=200)


def test_what_is_cut_off_needs_no_embedding(tmp_path):
    path, tokenizer = written(tmp_path, "a" * 100 + "<|x|>"), tokenizer_with("<|x|>")
    assert prepare(path, tokenizer, embedding_rows=ROWS, model_max_length=60).rows
    with raises("data.token_without_embedding"):
        prepare(path, tokenizer, embedding_rows=ROWS, model_max_length=200)


def test_rows_that_were_prepared_for_a_larger_model_are_not_taken(tmp_path):
    data = LocalFiles(path=written(tmp_path, "a"))

    def key(rows, *tokens):
        return key_of_rows(data, make_pipeline(tokenizer_with(*tokens), model_max_length=60, embedding_rows=rows))

    assert key(ROWS, "<|x|>") != key(ROWS + 1, "<|x|>")
    assert key(ROWS) == key(ROWS + 100) == key(None), "nothing to look for"
