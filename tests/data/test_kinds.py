"""`zero_sft.data.kinds`: what is not read is said by what it is, and compressed text is read."""

import gzip
import json

import pyarrow
import pytest

from tests.data.tiny import byte_tokenizer
from tests.errors import raises
from zero_sft.data.files import Files
from zero_sft.data.formats import read_samples
from zero_sft.data.templates import choose_template
from zero_sft.errors import DataError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def refused(path):
    with pytest.raises(DataError) as caught:
        read_samples(Files(path=path).objects())
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", LFS, "is a git-LFS pointer, without the data"),
        ("a.parquet", LFS, "is a git-LFS pointer, without the data"),
        ("a.jsonl.gz", LFS, "is a git-LFS pointer, without the data"),
        ("a.json", gzip.compress(b"{}"), "compressed with gzip. Let its name end in .gz"),
        ("a.json", pyarrow.compress(b"{}", "zstd", asbytes=True), "compressed with zstd. Let its name end in .zst"),
        ("a.json", b"PAR1....", "is a Parquet file"),
        ("a.jsonl", b"PK\x03\x04....", "is a zip archive"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        ("a.json", b"<!DOCTYPE html><html>", "is a web page"),
        (
            "a.json",
            b'{"data": [{"text": "a"}]}',
            "the keys 'data'. The samples seem to be in `data`: write that",
        ),
        ("a.json", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "write the chosen one as `completion`"),
    ],
    ids=str,
)
def test_it_is_said_what_a_file_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        assert said in refused(path)


def test_lines_compressed_with_zstd_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    lines = "".join(json.dumps({"text": f"你好 {number}"}, ensure_ascii=False) + "\n" for number in range(5000)).encode()
    parts = [pyarrow.compress(part, "zstd", asbytes=True) for part in (b"\xef\xbb\xbf" + lines[:-9], lines[-9:])]
    path.write_bytes(b"".join(parts))  # two frames, as `zstd` writes them of several files, and a byte order mark
    for each in (path, tmp_path):
        assert [sample.completion for sample in read_samples(Files(path=each).objects()).samples][-1] == "你好 4999"
    path.write_bytes(b"".join(parts)[:-12])
    assert "is damaged" in refused(path)
    path.write_bytes(b"no such thing" + parts[0])
    assert "is damaged" in refused(path)
    assert "no such file" in refused(tmp_path / "none.jsonl.zst")


def test_a_number_that_is_none_is_a_note_like_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n')
    assert len(read_samples(Files(path=tmp_path / "a.jsonl").objects()).samples) == 1


def test_a_template_that_is_a_folder(tmp_path):
    with raises("data.template_is_a_folder", "name the Jinja file itself"):
        choose_template(str(tmp_path), byte_tokenizer())
    (tmp_path / "chat_template.jinja").write_text("x")
    with raises("data.template_is_a_folder", "give", "chat_template.jinja"):
        choose_template(str(tmp_path), byte_tokenizer())
