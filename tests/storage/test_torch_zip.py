"""Headers of `.bin` files: offsets against the file's bytes, views and shared storages, and files that are wrong."""

import contextlib
import os
import zipfile
from pathlib import Path

import torch

from tests.errors import raises
from zero_sft.errors import CheckpointError
from zero_sft.storage.torch_zip import read_bin_header


def stored_bytes(entry):
    """The tensor that an entry describes, from the raw file."""
    raw = bytearray(Path(entry.file).read_bytes()[entry.offset_bytes : entry.offset_bytes + entry.nbytes])
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}[entry.dtype]
    strides = entry.strides or torch.empty(entry.shape, device="meta").stride()
    return torch.frombuffer(raw, dtype=dtype).as_strided(entry.shape, strides)


def test_offsets_are_those_of_the_bytes(tmp_path):
    whole = torch.randn(5, 7)
    tensors = {
        "whole": whole, "turned": torch.randn(4, 6).t(), "integers": torch.arange(10), "half": torch.randn(3).bfloat16(),
        "again": whole, "part": whole[2:4], "column": whole[:, 3], "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "scalar": torch.tensor(2.5),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.bin")
    found = read_bin_header(tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored_bytes(found[name]), tensor.detach()), name
    assert found["again"].offset_bytes == found["whole"].offset_bytes


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"a": torch.ones(2), "b": _Runs(tmp_path / "ran")}, tmp_path / "x.bin")
    with raises("checkpoint.unsafe_or_damaged"):
        read_bin_header(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def test_every_bit_of_a_directory(tmp_path):
    """Python's zipfile raises several types of errors for a damaged directory at the end of the file."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    for place in range(start, len(content)):
        for bit in (1, 2, 128):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with contextlib.suppress(CheckpointError):
                assert read_bin_header(path)["a"].shape == (2,)


def test_files_that_are_wrong(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    with raises("checkpoint.not_a_zip", "x.bin", "torch.save(torch.load"):
        read_bin_header(path)
    torch.save({"a": torch.ones(1000)}, path)
    os.truncate(path, 2000)
    with raises("checkpoint.not_a_zip", "x.bin"):
        read_bin_header(path)
    path.write_bytes(b"")
    with raises("checkpoint.placeholder_file", "x.bin"):
        read_bin_header(path)
    torch.save([torch.ones(3)], path)
    with raises("checkpoint.not_a_mapping", "list"):
        read_bin_header(path)
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with raises("checkpoint.not_a_plain_tensor"):
        read_bin_header(path)
    with raises("checkpoint.file_unreadable", "No such file"):
        read_bin_header(tmp_path / "absent.bin")


def test_a_view_that_negates_is_not_read_as_its_bytes(tmp_path):
    values = torch.arange(4.0)
    view = torch.complex(values, values).conj().imag
    assert view.is_neg()
    torch.save({"a": view}, tmp_path / "a.bin")
    with raises("checkpoint.not_a_plain_tensor", "'a'", "resolve_neg"):
        read_bin_header(tmp_path / "a.bin")


def test_a_compressed_file_is_named_as_such(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as plain, zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.load(tmp_path / "b.bin", weights_only=True)["a"].tolist() == [0, 1, 2, 3]
    with raises("checkpoint.compressed", "b.bin", "torch.save"):
        read_bin_header(tmp_path / "b.bin")
