"""Headers against the reference library, and every way a file can be damaged."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.errors import raises
from zero_sft.checkpoint.header import read_header


@pytest.fixture
def path(tmp_path):
    tensors = {
        "a": torch.arange(35, dtype=torch.bfloat16).view(5, 7),
        "b.scalar": torch.tensor(3.5),
        "c.empty": torch.zeros(0, 4),
        "d": torch.arange(9, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_offsets_are_those_of_the_reference_library(path):
    header, raw = read_header(path), path.read_bytes()
    with safe_open(path, framework="pt") as reference:
        assert set(header) == set(reference.keys())
        for name, entry in header.items():
            want = reference.get_tensor(name)
            assert entry.shape == tuple(want.shape)
            assert entry.nbytes == want.numel() * want.element_size()
            data = raw[entry.offset_bytes : entry.offset_bytes + entry.nbytes]
            assert data == want.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("cut", "code"),
    [(0, "placeholder_file"), (7, "header_too_long"), (8, "header_too_long"), (40, "header_too_long"), (-1, "truncated")],
)
def test_truncated(path, cut, code):
    path.write_bytes(path.read_bytes()[:cut])
    with raises(f"checkpoint.{code}", "model.safetensors"):
        read_header(path)


def test_longer_than_promised(path):
    path.write_bytes(path.read_bytes() + b"x")
    with raises("checkpoint.truncated", "model.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    ("code", "headers"),
    {
        "header_not_json": [
            b"not json at all", b"[" * 100_000, b'{"a":' * 100_000,
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ],
        "header_not_an_object": [b"[1, 2]"],
        "header_bad_entry": [
            {"a": 3}, {"a": {"dtype": "F32", "shape": [2]}}, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        ],
        "wrong_size_of_tensor": [{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}],
        "tensors_overlap": [
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("overlapping", "tensors")},
        ],
        "unknown_dtype": [
            {"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}} for dtype in ("Q9", ["F32"])
        ],
    }.items(),
)  # fmt: skip
def test_corrupt_headers(tmp_path, code, headers):
    for header in headers:
        write(tmp_path / "x.safetensors", header, b"1234")
        with raises(f"checkpoint.{code}", "x.safetensors"):
            read_header(tmp_path / "x.safetensors")


def test_garbage_length(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with raises("checkpoint.header_too_long", "18446744073709551615"):
        read_header(tmp_path / "x.safetensors")


def test_absent(tmp_path):
    with raises("checkpoint.file_unreadable"):
        read_header(tmp_path / "nothing.safetensors")
