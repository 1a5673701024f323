"""The index over one file or many, and index files that lie."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import raises
from zero_sft.checkpoint.folder_kind import is_folder
from zero_sft.checkpoint.index import read_index


def sharded(folder, weight_map=None):
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(5)}, folder / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    weight_map = weight_map or {name: f"model-0000{i}-of-00002.safetensors" for name, i in names.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_many_files(tmp_path):
    sharded(tmp_path)
    index = read_index(tmp_path)
    assert set(index.tensors) == {"a", "b", "c"}
    assert index.tensors["c"].file.endswith("00002-of-00002.safetensors")
    assert sum(tensor.nbytes for tensor in index.tensors.values()) == 4 * (3 + 4 + 5)


def test_digest_is_of_the_contents_not_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sharded(tmp_path / name)
    one, two = read_index(tmp_path / "one"), read_index(tmp_path / "two")
    assert one.digest() == two.digest()
    save_file({"c": torch.ones(6)}, tmp_path / "two" / "model-00002-of-00002.safetensors")
    assert one.digest() != read_index(tmp_path / "two").digest()


@pytest.mark.parametrize("name", ["/etc/passwd", "../other.safetensors", "a/../../x.safetensors", "..\\x"])
def test_names_outside_the_folder(tmp_path, name):
    sharded(tmp_path, {"a": name})
    with raises("checkpoint.index_leaves_folder"):
        read_index(tmp_path)


def test_a_name_that_no_file_system_takes(tmp_path):
    sharded(tmp_path, {"a": "a" * 5000})
    with raises("checkpoint.file_unreadable", "File name too long"):
        read_index(tmp_path)
    assert not is_folder(tmp_path / ("a" * 5000))
    assert is_folder(tmp_path)


def test_missing_file(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with raises("checkpoint.weight_file_missing"):
        read_index(tmp_path)


def test_tensor_not_where_promised(tmp_path):
    weight_map = sharded(tmp_path)
    sharded(tmp_path, {**weight_map, "d": weight_map["a"]})
    with raises("checkpoint.index_promises_other_tensors", "'d'", "model-00001-of-00002.safetensors"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": 5}',
        '{"weight_map": {"a": ""}}',
        "[" * 100_000,
    ],
)
def test_not_an_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with raises("checkpoint.index_malformed" if text else "checkpoint.placeholder_file", "model.safetensors.index.json"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"), [(None, ""), ("adapter_config.json", "--lora_weight_path"), ("x.bin", "--variant")]
)
def test_no_weights(tmp_path, name, remedy):
    if name:
        (tmp_path / name).write_bytes(b"")
    with raises("checkpoint.no_weights", str(tmp_path), name or "model.safetensors", remedy):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_link_to_nothing(tmp_path, name):
    """The hub's cache has such links where a download was cut short."""
    (tmp_path / name).symlink_to("../../blobs/4d7a2146")
    with raises("checkpoint.no_weights", f"{tmp_path / name} is a link to ../../blobs/4d7a2146") as caught:
        read_index(tmp_path)
    assert "found" not in str(caught.value)


def test_an_index_of_links_to_nothing(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "model-00002-of-00002.safetensors").symlink_to("../../blobs/4d7a2146")
    with raises("checkpoint.weight_file_missing", "'model-00002-of-00002.safetensors'", "a link to ../../blobs/4d7a2146"):
        read_index(tmp_path)


def test_a_link_to_nothing_does_not_hide_an_index(tmp_path):
    """As in plain `from_pretrained`."""
    sharded(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("/nothing/here")
    assert read_index(tmp_path).tensors.keys() == {"a", "b", "c"}


def test_of_a_name_in_two_files_the_last_counts_as_in_from_pretrained(tmp_path):
    sharded(tmp_path)
    save_file({"c": torch.ones(5), "a": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    index = read_index(tmp_path)
    assert index.tensors["a"].file.endswith("00002-of-00002.safetensors")
    assert index.duplicate_keys == ("a",)


def test_a_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with raises("checkpoint.no_tensors"):
        read_index(tmp_path)


def test_folders_in_place_of_files(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with raises("checkpoint.folder_in_place_of_file"):
        read_index(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    sharded(tmp_path, {"a": "sub"})
    (tmp_path / "sub").mkdir()
    with raises("checkpoint.weight_file_missing", "'sub'"):
        read_index(tmp_path)
