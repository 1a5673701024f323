"""`zero_sft.data.sources.file_kinds`: what is not read is said by what it is, and compressed text is read."""

import gzip
import json

import pyarrow
import pytest

from tests.data.tiny import byte_tokenizer
from tests.errors import raises
from zero_sft.data.samples.parse import DEFAULT_PARSER
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.templates.choose import choose_template

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def assert_refused(path, code, *values):
    with raises(f"data.{code}", *values):
        DEFAULT_PARSER.read(LocalFiles(path=path).objects())


@pytest.mark.parametrize(
    ("name", "content", "code", "value"),
    [
        ("a.json", LFS, "placeholder_file", "git lfs pull"),
        ("a.parquet", LFS, "placeholder_file", "git lfs pull"),
        ("a.jsonl.gz", LFS, "placeholder_file", "git lfs pull"),
        ("a.json", gzip.compress(b"{}"), "unsupported_kind", ".gz."),
        ("a.json", pyarrow.compress(b"{}", "zstd", asbytes=True), "unsupported_kind", ".zst."),
        ("a.json", b"PAR1....", "unsupported_kind", ".parquet."),
        ("a.jsonl", b"PK\x03\x04....", "unsupported_kind", "zip"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "unsupported_kind", "UTF-16"),
        ("a.jsonl", '\n{"text": "a"}'.encode("utf-16-le"), "not_utf8", "UTF-16"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16-be"), "not_utf8", "UTF-16"),
        ("a.json.gz", gzip.compress('{"text": "a"}'.encode("utf-16")), "not_utf8", "UTF-16"),
        ("a.json", b"<!DOCTYPE html><html>", "unsupported_kind", "web page"),
        (
            "a.json",
            b'{"data": [{"text": "a"}]}',
            "unknown_format",
            "`data`",
        ),
        ("a.json", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "unknown_format", "`completion`"),
    ],
    ids=str,
)
def test_it_is_said_what_a_file_is(tmp_path, name, content, code, value):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        assert_refused(path, code, value)


def test_lines_compressed_with_zstd_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps({"text": f"你好 {number}"}, ensure_ascii=False) + "\n" for number in range(5000)).encode()
    parts = [pyarrow.compress(part, "zstd", asbytes=True) for part in (b"\xef\xbb\xbf" + lines[:-9], lines[-9:])]
    path.write_bytes(b"".join(parts))  # two frames, as `zstd` writes them of several files, and a byte order mark
    for each in (path, tmp_path):
        assert [sample.completion for sample in DEFAULT_PARSER.read(LocalFiles(path=each).objects()).samples][-1] == "你好 4999"
    path.write_bytes(b"".join(parts)[:-12])
    assert_refused(path, "bad_compression", str(path))
    path.write_bytes(b"no such thing" + parts[0])
    assert_refused(path, "bad_compression", str(path))
    assert_refused(tmp_path / "none.jsonl.zst", "no_such_file", "none.jsonl.zst")


def test_a_number_that_is_none_is_a_note_like_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n')
    assert len(DEFAULT_PARSER.read(LocalFiles(path=tmp_path / "a.jsonl").objects()).samples) == 1


def test_a_template_that_is_a_folder(tmp_path):
    with raises("data.template_is_a_folder", str(tmp_path)):
        choose_template(str(tmp_path), byte_tokenizer())
    (tmp_path / "chat_template.jinja").write_text("x")
    with raises("data.template_is_a_folder", str(tmp_path / "chat_template.jinja")):
        choose_template(str(tmp_path), byte_tokenizer())
