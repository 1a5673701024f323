"""`zero_sft.data.mixture`: several sources, with weights and without."""

import json
from pathlib import Path

import pytest

from tests.data.test_dataset import trained
from tests.data.tiny import byte_tokenizer, prepare
from tests.errors import raises
from zero_sft.data.mixture import mix
from zero_sft.data.sources.data_path import Source, parse_sources
from zero_sft.data.sources.hub_dataset import HubDataset
from zero_sft.data.sources.local_files import LocalFiles


@pytest.fixture
def files(tmp_path):
    """Ten samples "a", and two "b"."""
    for name, count in (("a", 10), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"text": name})] * count))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def test_what_a_path_names(tmp_path):
    def files(name, weight=None):
        return Source(data=LocalFiles(path=Path(name)), weight=weight)

    def hub(name, split="train", weight=None, config=None):
        return Source(data=HubDataset(id=name, split=split, config=config), weight=weight)

    assert list(parse_sources("a.json")) == [files("a.json")]
    assert list(parse_sources("a.json, b")) == [files("a.json"), files("b")]
    assert list(parse_sources("a.json:0.7,b:3")) == [files("a.json", 0.7), files("b", 3.0)]
    assert list(parse_sources("c:drive")) == [files("c:drive")]
    strange = tmp_path / "a,b:0.5.json"
    strange.write_text("")
    assert list(parse_sources(str(strange))) == [files(strange)]
    assert list(parse_sources("org/name")) == [hub("org/name")]
    assert list(parse_sources("org/name:test_sft")) == [hub("org/name", "test_sft")]
    assert list(parse_sources("org/name:test_sft:0.5,o/n.v2:0.5")) == [
        hub("org/name", "test_sft", 0.5),
        hub("o/n.v2", weight=0.5),
    ]
    assert list(parse_sources("org/name:en:test_sft:2,a.jsonl.gz:1")) == [
        hub("org/name", "test_sft", 2.0, "en"),
        files("a.jsonl.gz", 1.0),
    ]
    for local in ("org/name.json", "./name", "/org/name", "a/b/c", "tests/name"):
        assert list(parse_sources(local)) == [files(local)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a,", "no_path"),
        ("", "no_path"),
        (" ", "no_path"),
        ("a:0.5,b", "weights_missing"),
        ("a:0,b:1", "bad_weight"),
        ("a:nan,b:1", "bad_weight"),
        (":1,b:1", "bad_weight"),
        ("a:1e-300,b:1e300", "weights_too_far_apart"),
    ],
)
def test_what_names_no_sources(text, code):
    with raises(f"data.{code}"):
        parse_sources(text)


@pytest.mark.parametrize("lazy", [False, True])
def test_one_after_the_other(files, lazy):
    tokenizer = byte_tokenizer()
    parts = [prepare(each, tokenizer, model_max_length=64, lazy=lazy) for each in files]
    mixed = mix(parts, [None, None], seed=1)
    assert trained(mixed, tokenizer) == ["a</s>"] * 10 + ["b</s>"] * 2
    assert [line.split(":")[0] for line in mixed.lines() if " samples, " in line] == [str(each) for each in files]


@pytest.mark.parametrize("lazy", [False, True])
def test_drawn_by_weight_until_each_sample_was_there(files, lazy):
    tokenizer = byte_tokenizer()
    parts = [prepare(each, tokenizer, model_max_length=64, lazy=lazy) for each in files]
    mixed, again = (mix(parts, [1.0, 1.0], seed=3) for _ in range(2))
    texts = trained(mixed, tokenizer)
    assert texts == trained(again, tokenizer)
    assert texts.count("a</s>") >= 10
    assert 4 < texts.count("b</s>") < 25, "two samples, as often as the ten"
    assert f"{texts.count('b</s>')} of {len(texts)} rows of the mixture" in mixed.lines()[-1]
    assert mixed.rows.column_names == parts[0].rows.column_names


def test_weights_that_would_make_a_mixture_of_thousands_of_times_the_data(files):
    tokenizer = byte_tokenizer()
    parts = [prepare(each, tokenizer, model_max_length=64) for each in files]
    with raises("data.weights_too_far_apart", "200,002", "are 12"):
        mix(parts, [1.0, 1e-5], seed=3)
