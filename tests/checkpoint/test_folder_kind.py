"""Folders and files that are something else than a model: named for what they are, with the remedy."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import raises
from zero_sft.checkpoint.folder_kind import adapter_warning, describe_folder, describe_placeholder
from zero_sft.checkpoint.header import read_header
from zero_sft.checkpoint.index import read_index
from zero_sft.config import load_config
from zero_sft.hub.options import HubOptions
from zero_sft.storage import torch_zip
from zero_sft.tokenizer.setup import explain_damage, set_up

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head></html>\n"

FOLDERS = {
    # kind: the files in it, what the message must name
    "adapter": (("adapter_config.json", "adapter_model.safetensors"), ("adapter", "'org/base'", "--lora_weight_path")),
    "gguf": (("model.Q4_K_M.gguf", "README.md"), ("GGUF", "model.Q4_K_M.gguf")),
    "diffusers": (("model_index.json",), ("model_index.json", "diffusers", "--subfolder")),
    "meta": (("consolidated.00.pth", "params.json", "tokenizer.model"), ("consolidated.00.pth", "model.safetensors")),
    "mistral": (("consolidated.safetensors", "params.json", "tekken.json"), ("consolidated.safetensors", "config.json")),
    "deepspeed": (
        ("latest", "zero_to_fp32.py", "global_step5/x.pt"),
        ("DeepSpeed", "--resume_from_checkpoint", "zero_sft.export"),
    ),
    "trainer": (("trainer_state.json", "rng_state.pth"), ("trainer_state.json", "--resume_from_checkpoint")),
    "run": (("checkpoint-9/config.json", "checkpoint-10/config.json"), ("checkpoint-10, checkpoint-9",)),
    "tensorflow": (("tf_model.h5",), ("tf_model.h5", "TensorFlow", "from_tf")),
    "flax": (("flax_model.msgpack",), ("flax_model.msgpack", "Flax", "from_flax")),
    "onnx": (("onnx/model.onnx",), ("model.onnx", "ONNX")),
    "sentence-transformers": (("modules.json",), ("modules.json", "sentence-transformers")),
}


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"base_model_name_or_path": "org/base"}' if name == "adapter_config.json" else b"{}")


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path, kind):
    names, values = FOLDERS[kind]
    write(tmp_path, names)
    with raises("config.missing", str(tmp_path), *values):
        load_config(tmp_path, HubOptions())
    with raises("checkpoint.no_weights", str(tmp_path), *values):
        read_index(tmp_path, torch_zip.read_bin_header)


def test_a_folder_of_which_nothing_is_known(tmp_path):
    write(tmp_path, ["notes.txt"])
    assert describe_folder(tmp_path) == ""
    with raises("config.missing", f"config.json in {tmp_path}"):
        load_config(tmp_path, HubOptions())


def test_parts_without_their_index(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    with raises("checkpoint.no_weights", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        read_index(tmp_path)


def test_an_adapter_next_to_the_weights_is_named(tmp_path):
    assert adapter_warning(tmp_path) == ""
    write(tmp_path, ["adapter_config.json", "model.safetensors"])
    warning = adapter_warning(tmp_path)
    assert "'org/base'" in warning
    assert "zero_sft.export" in warning


@pytest.mark.parametrize("content", [POINTER, PAGE, b""])
def test_placeholders(tmp_path, content):
    remedy = {POINTER: "git lfs pull", PAGE: "(HTML)", b"": ""}[content]
    for name, read, code in (
        ("model.safetensors", lambda: read_index(tmp_path), "checkpoint.placeholder_file"),
        ("other.safetensors", lambda: read_header(tmp_path / "other.safetensors"), "checkpoint.placeholder_file"),
        ("pytorch_model.bin", lambda: torch_zip.read_bin_header(tmp_path / "pytorch_model.bin"), "checkpoint.placeholder_file"),
        ("config.json", lambda: load_config(tmp_path, HubOptions()), "config.placeholder_file"),
        ("model.safetensors.index.json", lambda: read_index(tmp_path), "checkpoint.placeholder_file"),
    ):
        for other in tmp_path.iterdir():
            other.unlink()
        path = tmp_path / name
        path.write_bytes(content)
        with raises(code, str(path), remedy):
            read()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_placeholders_of_the_tokenizer(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / name).write_bytes(POINTER)
    with raises("tokenizer.placeholder_file", name, "git lfs pull"), explain_damage(tmp_path):
        set_up(tmp_path, HubOptions(), 64, "right")


def test_real_content_is_no_placeholder(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert describe_placeholder(tmp_path / "model.safetensors") == describe_placeholder(tmp_path / "config.json") == ""
    assert describe_placeholder(tmp_path / "missing") == ""
