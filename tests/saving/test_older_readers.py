"""Exports open in transformers 4 as in transformers 5: the same ids, the same logits.

The other release is in an environment that `make test-all` makes (`.venv-4`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import architectures, models
from tests.data import tiny
from zero_sft.saving.older_readers import older_tokenizer_config, with_older_keys
from zero_sft.tokenizer.fingerprint import PROBES

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".venv-4" / "bin" / "python"

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0], "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {  # model type, what is laid over its RoPE parameters
    "llama": ("llama", {}),
    "llama, linear": ("llama", {"rope_type": "linear", "factor": 2.0}),
    "llama, dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    "llama, llama3": ("llama", LLAMA3),
    "qwen2, yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "qwen3_moe": ("qwen3_moe", {"rope_type": "linear", "factor": 2.0}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "olmo2, linear": ("olmo2", {"rope_type": "linear", "factor": 2.0}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "stablelm": ("stablelm", {"rope_type": "linear", "factor": 2.0}),
    "gemma2": ("gemma2", {}),
    "gemma3_text, linear": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    "cohere2": ("cohere2", {}),
    "glm4": ("glm4", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "gpt_oss": ("gpt_oss", {}),
}
TYPES = sorted({model_type for model_type, _ in CASES.values()})


def case_config(name):
    """The tiny config of a case; its theta is 500,000, that of layers that see a window 20,000."""
    model_type, changes = CASES[name]
    config = architectures.tiny_config(model_type)
    rope = config.rope_parameters
    by_layer = [each for each in rope.values() if isinstance(each, dict)]
    for number, each in enumerate(by_layer or [rope]):
        is_local = bool(by_layer) and "sliding" in list(rope)[number]
        each["rope_theta"] = 20_000.0 if is_local else 500_000.0
        if not is_local:
            each.update(changes)
    return config


def settings(config):
    """A config's settings as it is understood, without those that only repeat others."""
    repeated = {"_name_or_path", "rope_theta", "partial_rotary_factor", "torch_dtype", "num_experts", "rope_scaling"}
    return {name: value for name, value in config.to_dict().items() if name not in repeated}


@pytest.mark.parametrize("name", CASES)
def test_transformers_5_reads_the_same_config(tmp_path, name):
    case_config(name).save_pretrained(tmp_path / "own")
    raw = json.loads((tmp_path / "own" / "config.json").read_text())
    older = with_older_keys(raw)
    assert raw.items() <= older.items(), "nothing of transformers 5's is lost"
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "config.json").write_text(json.dumps(older))
    one, other = (settings(AutoConfig.from_pretrained(tmp_path / folder)) for folder in ("own", "both"))
    if CASES[name][0] == "olmo2":
        other["rope_parameters"].pop("type")  # such a reader wants it under this name
    assert one == other


def test_the_keys_that_transformers_4_reads():
    llama = with_older_keys({"model_type": "llama", "dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    assert llama["torch_dtype"] == "bfloat16"
    assert (llama["rope_theta"], llama["rope_scaling"]) == (5e5, LLAMA3)
    plain = with_older_keys({"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert plain["rope_scaling"] is None
    by_layer = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    gemma = with_older_keys({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rope_parameters": by_layer}})
    text = gemma["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    neox = {"rope_theta": 2e4, "partial_rotary_factor": 0.25, "rope_type": "default"}
    neox = with_older_keys({"model_type": "gpt_neox", "rope_parameters": neox})
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (2e4, 0.25)
    olmo = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2}
    assert with_older_keys({"model_type": "olmo2", "rope_parameters": olmo})["rope_scaling"] == {
        "type": "linear",
        "factor": 2.0,
    }
    assert with_older_keys({"model_type": "qwen3_moe", "num_local_experts": 7})["num_experts"] == 7
    mamba = with_older_keys({"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert mamba["time_step_limit"] == [0.0, float("inf")]


def test_a_tokenizer_config_that_both_open():
    saved = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    older = older_tokenizer_config(saved, {}, {}, None)
    assert older == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
        "bos_token": None,  # GPT2Tokenizer of transformers 4 has one where this is not said
        "unk_token": None,
    }
    base = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    older = older_tokenizer_config(saved, base, {"add_bos_token": False, "add_eos_token": False}, "{{ messages }}")
    assert (older["tokenizer_class"], older["add_bos_token"], older["chat_template"]) == (
        "LlamaTokenizerFast",
        False,
        "{{ messages }}",
    )
    assert "add_eos_token" not in older
    own = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<x>")
    named = {"tokenizer_class": "GemmaTokenizer", **own, "model_specific_special_tokens": {"image_token": "<i>"}}
    assert older_tokenizer_config(named, {}, {}, {"default": "a", "tools": "b"}) == {
        "tokenizer_class": "GemmaTokenizer",
        **own,
        "extra_special_tokens": {"image_token": "<i>"},
        "chat_template": [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}],
    }


def test_the_tokenizer_keeps_what_the_model_can_read(tmp_path):
    """The length is the base's, where a run has set its own; the padding side is the run's."""
    from zero_sft.saving.settings import _write_tokenizer
    from zero_sft.tokenizer.serialize import keep_base_config

    config = models.tiny_config("llama", max_position_embeddings=8192)
    cases = {
        "the base's": ({"model_max_length": 16_384, "padding_side": "left"}, 16_384),
        "the config's, where the base states none": ({"model_max_length": 10**30}, 8192),
        "the config's, where it was stretched": ({"model_max_length": 4096}, 8192),
        "a tokenizer of the user's": ({}, 8192),
    }
    for number, (base, length) in enumerate(cases.values()):
        tokenizer = tiny.byte_tokenizer()
        tokenizer.model_max_length, tokenizer.padding_side = 256, "right"
        keep_base_config(tokenizer, base)
        (tmp_path / str(number)).mkdir()
        _write_tokenizer(tmp_path / str(number), tokenizer, config)
        saved = json.loads((tmp_path / str(number) / "tokenizer_config.json").read_text())
        assert (saved["model_max_length"], saved.get("padding_side", "right")) == (length, "right")
        assert (tokenizer.model_max_length, tokenizer.padding_side) == (256, "right"), "the run's own stays"


def read_by(python, folders):
    """What a release of transformers makes of the folders."""
    script = str(Path(__file__).with_name("opened.py"))
    done = subprocess.run(
        [python, script, *map(str, folders)], capture_output=True, text=True, timeout=500, check=False, cwd=ROOT.parent,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(Path.home())},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(folders), done.stderr[-2000:]
    return lines


def assert_read_alike(folders):
    if not OLDER.exists():
        pytest.skip("no .venv-4: `make older-readers` makes it")
    for folder, one, other in zip(folders, read_by(sys.executable, folders), read_by(str(OLDER), folders), strict=True):
        assert "error" not in one, (folder.name, one)
        assert "error" not in other, (folder.name, other)
        expected, found = torch.tensor(one.pop("logits")), torch.tensor(other.pop("logits"))
        assert other == one, folder.name
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max(), folder.name


@pytest.mark.slow
def test_logits_in_transformers_4(tmp_path):
    folders = []
    for name in CASES:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(case_config(name), dtype=torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape) * 0.3)
        folders.append(tmp_path / name.replace(", ", "_"))
        model.save_pretrained(folders[-1])
        path = folders[-1] / "config.json"
        path.write_text(json.dumps(with_older_keys(json.loads(path.read_text()))))
    assert_read_alike(folders)


def export(name, folder, out):
    """Export a published model as the job does. One rank."""
    from tests.published import models as published
    from zero_sft import load_model, load_tokenizer, prepare_config, save_pretrained

    published.write(name, folder)
    config = prepare_config(str(folder), model_max_length=512)
    tokenizer = load_tokenizer(str(folder), model_max_length=512)
    model = load_model(str(folder), ds_config=models.zero3(bf16=False), config=config, dtype=torch.float32)
    save_pretrained(model, out, tokenizer=tokenizer)
    special = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})[:64]
    texts = [*PROBES, "".join(f"{token}a {token}" for token in special)]
    (out / "texts.json").write_text(json.dumps(texts))
    (out / "ids.json").write_text(json.dumps([tokenizer.encode(text) for text in texts]))


PUBLISHED = (
    "Llama-3.1-8B", "Qwen3-8B-Base", "Qwen3-30B-A3B", "gemma-3-1b-it", "DeepSeek-R1", "vicuna-7b-v1.5-16k", "Mistral-7B-v0.3",
    "phi-4", "OLMo-2-1124-7B", "gpt-oss-20b",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.world_size(1, timeout_s=600)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_export(tmp_path, name):
    export(name, tmp_path / "base", tmp_path / "out")
    assert_read_alike([tmp_path / "out"])
    (found,) = read_by(sys.executable, [tmp_path / "out"])
    assert found["ids"] == json.loads((tmp_path / "out" / "ids.json").read_text()), "the ids that were trained on"
