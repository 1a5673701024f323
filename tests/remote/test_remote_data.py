"""Data at URLs: the same objects and tokens as from local files, whatever the server does, or one clear error."""

import bz2
import gzip
import json
import sys

import pyarrow
import pytest
import s3fs
from pyarrow import parquet

from tests.data.tiny import CHATML, byte_tokenizer
from tests.errors import raises
from tests.remote import standin
from zero_sft import remote
from zero_sft.data.dataset import prepare_source
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.sources.data_path import HubDataset, parse_evaluation, parse_sources
from zero_sft.data.templates.choose import choose_template

ROWS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "é" * (n + 1)}]} for n in range(300)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet_bytes():
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


FILES = {
    "bucket/one/train.jsonl": LINES,
    "bucket/one/test.jsonl": LINES[: LINES.index(b"\n") + 1],
    "bucket/one/.hidden/x.jsonl": b"broken",
    "bucket/one/README.md": b"# about",
    "bucket/kinds/a.jsonl.gz": gzip.compress(LINES),
    "bucket/kinds/b.jsonl.bz2": bz2.compress(LINES),
    "bucket/kinds/c.json": json.dumps(ROWS).encode(),
    "bucket/kinds/d.parquet": parquet_bytes(),
    "bucket/kinds/e.jsonl.zst": pyarrow.compress(LINES, "zstd", asbytes=True),
    "bucket/declared/x.jsonl": LINES,
    "bucket/declared/README.md": b"---\nconfigs:\n- config_name: a\n  data_files: x.jsonl\n---\n",
    "bucket/declared/other.jsonl": b"broken",
}


@pytest.fixture
def s3(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    with standin.serve_s3(standin.Store(dict(FILES), key="the-key"), monkeypatch) as store:
        yield store


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    with standin.serve(standin.Store(dict(FILES))) as store:
        yield store


def source(text):
    ((only),) = parse_sources(text)
    return only.data


def objects(text):
    return [sample for sample, _ in source(text).objects()]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl.bz2", "c.json", "d.parquet", "e.jsonl.zst"])
def test_every_kind_of_file_is_read_from_s3(s3, name):
    assert objects(f"s3://bucket/kinds/{name}") == ROWS


def test_a_folder_has_splits_as_a_local_one_has(s3):
    assert objects("s3://bucket/one") == ROWS
    assert objects("s3://bucket/one:test:0.5") == ROWS[:1]
    assert objects("s3://bucket/one/") == ROWS
    assert "left out: test (1 file)" in source("s3://bucket/one").chosen().note
    assert objects("s3://bucket/declared") == ROWS
    with raises("data.no_such_split", "s3://bucket/one has no split 'dev'"):
        objects("s3://bucket/one:dev")
    s3.files["bucket/texts/a.txt"] = b"no data"
    with raises("data.no_data_files", "s3://bucket/texts", "a.txt"):
        source("s3://bucket/texts").chosen()
    with raises("data.no_such_file", "s3://bucket/none"):
        source("s3://bucket/none").chosen()


def test_prepared_rows_are_those_of_the_local_file(s3, tmp_path):
    (tmp_path / "local.jsonl").write_bytes(LINES)
    tokenizer = byte_tokenizer(CHATML)
    template = choose_template(None, tokenizer)
    spec = DatasetSpec(sources=(), model_max_length=1000, root=tmp_path / "cache")
    pipeline = spec.pipeline(tokenizer, template)
    local, far = (
        prepare_source(source(text), pipeline, tmp_path / "cache").samples
        for text in (str(tmp_path / "local.jsonl"), "s3://bucket/one/train.jsonl")
    )
    assert far["input_ids"] == local["input_ids"]
    assert far["labels"] == local["labels"]
    assert far["place"][2] == "s3://bucket/one/train.jsonl, line 3"
    s3.requests.clear()
    prepare_source(source("s3://bucket/one/train.jsonl"), pipeline, tmp_path / "cache")
    assert not any(method == "GET" and "train.jsonl" in path for method, path in s3.requests)  # by its ETag


def test_a_changed_file_is_prepared_again_or_refused(s3, tmp_path):
    data = source("s3://bucket/one/train.jsonl")
    before, state = data.identity(), data.state()
    s3.files["bucket/one/train.jsonl"] = LINES.replace(b"say 1", b"say 2", 1)
    assert data.identity() != before
    assert data.state() != state


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_a_server_in_trouble_is_asked_again(web, fault):
    url = f"{web.url}/bucket/one/train.jsonl"
    setattr(web, fault, 3)
    assert objects(url) == ROWS
    setattr(web, fault, 10**6)
    with raises("data.file_unreadable", url, "503" if fault == "busy" else ""):
        objects(url)


def test_large_files_are_read_once_in_few_requests(web):
    web.files["bucket/big.jsonl"] = content = LINES * 60  # 18 MB
    assert len(objects(f"{web.url}/bucket/big.jsonl")) == 60 * len(ROWS)
    assert web.sent["bucket/big.jsonl"] <= len(content) + 3 * 2**18
    assert sum(method == "GET" for method, _ in web.requests) < 15


@pytest.mark.parametrize("name", ["one/train.jsonl", "kinds/d.parquet", "kinds/a.jsonl.gz"])
def test_a_server_without_ranges_or_etags(web, name):
    web.ranges = web.etags = False
    url = f"{web.url}/bucket/{name}"
    assert objects(url) == ROWS
    before = source(url).identity()
    web.files[f"bucket/{name}"] += b"\n"
    assert source(url).identity() != before


@pytest.mark.parametrize("name", ["a#1.jsonl", "what?x.jsonl", "with space.jsonl", "é%20.jsonl", "a@b.jsonl"])
def test_keys_of_s3_may_have_any_character(s3, name):
    s3.files[f"bucket/odd/{name}"] = LINES
    assert objects("s3://bucket/odd") == ROWS
    (_, place) = next(iter(source("s3://bucket/odd").objects()))
    assert place == f"s3://bucket/odd/{name}, line 1"
    if "?" not in name:  # s3fs takes what follows for a version
        assert objects(f"s3://bucket/odd/{name}") == ROWS


def test_a_file_that_changes_while_it_is_read_is_refused(web):
    content = LINES * 20
    web.files["bucket/big.jsonl"] = content
    found = source(f"{web.url}/bucket/big.jsonl").objects()
    next(found)
    web.files["bucket/big.jsonl"] = content.replace(b"say 7", b"say 8")
    with raises("data.file_unreadable", "big.jsonl", "changed while it was read"):
        list(found)


def test_a_server_that_is_not_there_is_not_a_missing_file(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    with standin.serve(standin.Store({})) as store:
        url = f"{store.url}/a.jsonl"
    with raises("data.file_unreadable", url, "Connect call failed"):
        objects(url)


def test_what_is_secret_is_not_shown_in_the_error_of_a_server(web, caplog):
    """aiohttp writes the query in another form than it was given."""
    url = f"{web.url}/bucket/one/train.jsonl?X-Sig=5ec2e7%2Fx%3D,5ec2e7%20y"
    web.busy = 10**6
    caplog.set_level("INFO")
    with raises("data.file_unreadable", "503") as caught:
        objects(url)
    assert "5ec2e7" not in str(caught.value) + caplog.text
    assert "trying again" in caplog.text


def test_commas_in_an_address_of_the_web():
    first, second = parse_sources("https://h/a.jsonl?sig=a,5ec2e7,b:0.5,s3://b/c.jsonl:0.5")
    assert (first.data.url, first.weight) == ("https://h/a.jsonl?sig=a,5ec2e7,b", 0.5)
    assert (second.data.url, first.text) == ("s3://b/c.jsonl", "https://h/a.jsonl?...")
    (only,) = parse_sources("http://user:PA,SSW@h/a.jsonl")
    assert (only.data.url, only.text) == ("http://user:PA,SSW@h/a.jsonl", "http://h/a.jsonl")
    assert [source.text for source in parse_sources("https://h/a.jsonl?s=1,other.jsonl")] == [
        "https://h/a.jsonl?...",
        "other.jsonl",
    ]
    for empty in ("s3://", "https:///"):
        with raises("data.no_path", empty):
            parse_sources(empty)


def test_what_is_secret_is_not_shown(web):
    url = f"{web.url.replace('://', '://user:pass@')}/bucket/one/train.jsonl?X-Amz-Signature=5ec2e7"
    (only,) = parse_sources(f"{url}:0.5")
    _, place = next(iter(only.data.objects()))
    shown = [only.text, only.data.name, place]
    web.files.clear()
    with raises("data.no_such_file") as caught:
        next(iter(only.data.objects()))
    for text in (*shown, str(caught.value)):
        assert "train.jsonl?..." in text
        assert "5ec2e7" not in text
        assert "pass" not in text


def test_refusals_name_the_reason(s3, web, monkeypatch):
    s3.key = "another"
    with raises("data.file_unreadable", "s3://bucket/one/train.jsonl", "access denied"):
        objects("s3://bucket/one/train.jsonl")
    web.key = "another"
    with raises("data.file_unreadable", "access denied"):
        objects(f"{web.url}/bucket/one/train.jsonl")
    with raises("data.no_such_file", "/bucket/none.jsonl"):
        web.key = None
        objects(f"{web.url}/bucket/none.jsonl")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with raises("data.file_unreadable", "s3://bucket/one/train.jsonl", "access denied", "credentials"):
        objects("s3://bucket/one/train.jsonl")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with raises("data.file_unreadable", "gs://bucket/a.jsonl", "pip install gcsfs"):
        objects("gs://bucket/a.jsonl")


def test_what_a_url_stands_for():
    assert source("hf://datasets/org/name") == HubDataset(id="org/name")
    assert source("hf://datasets/org/name@v1.2:test_sft:0.5") == HubDataset(id="org/name", revision="v1.2", split="test_sft")
    assert source("hf://datasets/org/name/data/a.jsonl").url == "hf://datasets/org/name/data/a.jsonl"
    resolved = "https://huggingface.co/datasets/org/name/resolve/main/a.jsonl"
    assert source(resolved).url == resolved
    sets = parse_evaluation("tide=s3://b/a.jsonl,chat=https://h:8080/b.json")
    assert [each.data.name for (each,) in sets.values()] == ["s3://b/a.jsonl", "https://h:8080/b.json"]
