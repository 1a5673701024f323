"""Layouts that are written must read back through the reference library."""

import torch
from safetensors.torch import load_file

from zero_sft.checkpoint.file_layout import index_json, lay_out
from zero_sft.checkpoint.header import read_header

TENSORS = [("x", "F32", (3, 5)), ("y", "BF16", (7,)), ("z", "I64", ()), ("empty", "F32", (0, 2))]


def test_one_file_reads_back(tmp_path):
    (file,) = lay_out(TENSORS)
    assert file.name == "model.safetensors"
    path = tmp_path / file.name
    path.write_bytes(file.header + bytes(file.nbytes - len(file.header)))
    found = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {n: s for n, _, s in TENSORS}
    assert found["y"].dtype == torch.bfloat16
    assert len(file.header) % 8 == 0
    header = read_header(path)
    assert {each.name: each.offset_bytes for each in file.tensors} == {n: t.offset_bytes for n, t in header.items()}


def test_files_fill_up_in_order():
    files = lay_out(TENSORS, max_file_bytes=60)
    assert [[each.name for each in file.tensors] for file in files] == [["x"], ["y", "z", "empty"]]
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert '"total_size": 82' in index_json(files)


def test_a_tensor_larger_than_a_file_gets_its_own():
    assert [len(file.tensors) for file in lay_out(TENSORS, max_file_bytes=1)] == [1, 1, 1, 1]
