"""Folders and files that are something else than a model: named for what they are, with the remedy."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import raises
from zero_sft.checkpoint.folder_kind import adapter_warning, folder_kind, placeholder
from zero_sft.checkpoint.header import read_header
from zero_sft.checkpoint.index import read_index
from zero_sft.config import load_config
from zero_sft.errors import CheckpointError, ConfigError
from zero_sft.hub.options import HubOptions
from zero_sft.storage import torch_zip
from zero_sft.tokenizer.setup import set_up

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head></html>\n"

FOLDERS = {
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), ("adapter", "'org/base'", "merge_and_unload")),
    "gguf": (("model.Q4_K_M.gguf", "README.md"), ("GGUF", "model.Q4_K_M.gguf")),
    "diffusers": (("model_index.json",), ("diffusers", "--subfolder")),
    "meta": (("consolidated.00.pth", "params.json", "tokenizer.model"), ("Hugging Face version",)),
    "mistral": (("consolidated.safetensors", "params.json", "tekken.json"), ("Hugging Face version",)),
    "deepspeed": (("latest", "zero_to_fp32.py", "global_step5/x.pt"), ("DeepSpeed checkpoint", "zero_to_fp32.py")),
    "trainer": (("trainer_state.json", "rng_state.pth"), ("trainer's checkpoint", "--resume_from_checkpoint")),
    "run": (("checkpoint-9/config.json", "checkpoint-10/config.json"), ("checkpoint-10, checkpoint-9", "Name one")),
    "tensorflow": (("tf_model.h5",), ("TensorFlow", "from_tf")),
    "flax": (("flax_model.msgpack",), ("Flax", "from_flax")),
    "onnx": (("onnx/model.onnx",), ("ONNX",)),
    "sentence-transformers": (("modules.json",), ("sentence-transformers",)),
}


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"base_model_name_or_path": "org/base"}' if name == "adapter_config.json" else b"{}")


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path, kind):
    names, parts = FOLDERS[kind]
    write(tmp_path, names)
    for read, error in (
        (lambda: load_config(tmp_path, HubOptions()), ConfigError),
        (lambda: read_index(tmp_path, torch_zip.read_header), CheckpointError),
    ):
        with pytest.raises(error) as caught:
            read()
        for part in (str(tmp_path), *parts):
            assert part in str(caught.value), str(caught.value)


def test_a_folder_of_which_nothing_is_known(tmp_path):
    write(tmp_path, ["notes.txt"])
    assert folder_kind(tmp_path) == ""
    with raises("config.missing", "no config.json"):
        load_config(tmp_path, HubOptions())


def test_parts_without_their_index(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with raises("checkpoint.no_weights", "model.safetensors.index.json) is missing"):
        read_index(tmp_path)


def test_an_adapter_next_to_the_weights_is_named(tmp_path):
    assert adapter_warning(tmp_path) == ""
    write(tmp_path, ["adapter_config.json", "model.safetensors"])
    warning = adapter_warning(tmp_path)
    assert "'org/base'" in warning
    assert "NOT applied" in warning


@pytest.mark.parametrize("content", [POINTER, PAGE, b""])
def test_placeholders(tmp_path, content):
    expected = {POINTER: "git lfs pull", PAGE: "web page", b"": "it is empty"}[content]
    path = tmp_path / "model.safetensors"
    for name, read, error in (
        ("model.safetensors", lambda: read_index(tmp_path), CheckpointError),
        ("other.safetensors", lambda: read_header(tmp_path / "other.safetensors"), CheckpointError),
        ("pytorch_model.bin", lambda: torch_zip.read_header(tmp_path / "pytorch_model.bin"), CheckpointError),
        ("config.json", lambda: load_config(tmp_path, HubOptions()), ConfigError),
        ("model.safetensors.index.json", lambda: read_index(tmp_path), CheckpointError),
    ):
        for other in tmp_path.iterdir():
            other.unlink()
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(error) as caught:
            read()
        assert expected in str(caught.value), (name, str(caught.value))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_placeholders_of_the_tokenizer(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / name).write_bytes(POINTER)
    with raises("tokenizer.placeholder_file", "git lfs pull") as caught:
        set_up(tmp_path, HubOptions(), 64, "right")
    assert name in str(caught.value)


def test_real_content_is_no_placeholder(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert placeholder(tmp_path / "model.safetensors") == placeholder(tmp_path / "config.json") == ""
    assert placeholder(tmp_path / "missing") == ""
