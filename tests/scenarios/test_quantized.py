"""Compare FP8 checkpoints with plain loading, which dequantises on a CPU, and test that unusable ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import architectures, models, quantised
from tests.errors import raises

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def checkpoint(tmp_path, architecture):
    if architecture == "deepseek_v3":
        folder = architectures.save(architecture, tmp_path / architecture)
        return quantised.fp8(folder, block=(1, 1))
    return quantised.fp8(models.save_tiny(architecture, tmp_path / architecture, **SIZES), block=(8, 16))


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_as_plain_loading_dequantises(checkpoint, dtype):
    from zero_sft import load_model

    wanted = getattr(torch, dtype)
    reference = models.plain(checkpoint, wanted)
    model = load_model(str(checkpoint), ds_config=models.zero3(bf16=dtype == "bfloat16"), dtype=dtype, verify=True)
    for param in reference.parameters():
        param.data = param.data.to(wanted)  # plain loading keeps the stored dtype of tensors that are not quantised
    models.assert_equal(model, reference, cast=wanted if dtype == "bfloat16" else None)
    report = model.load_report
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert not report.untraceable_keys
    assert any(".mlp." in name for name in report.dequantized_keys)
    assert not hasattr(model.config, "quantization_config")


@pytest.fixture(params=[(8, 16), (20, 16)])
def ragged(request, tmp_path):
    """Sizes that the blocks do not divide, like DeepSeek-V3's (576, 7168) in blocks of 128 × 128.

    Plain loading refuses them. If the grid of blocks happens to divide a weight, it assumes smaller blocks instead.
    """
    folder = models.save_tiny("llama", tmp_path / "ragged")
    plain = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return quantised.fp8(folder, block=request.param), plain, request.param


@pytest.mark.world_size(1, 3)
def test_blocks_cut_short_at_the_edges(ragged):
    from zero_sft import load_model

    folder, plain, (rows, cols) = ragged
    model = load_model(str(folder), ds_config=models.zero3(bf16=False), dtype="float32", verify=True)
    for name, param in model.named_parameters():
        got = models.gather_full(param)
        if name in model.load_report.dequantized_keys:
            weight, scales = quantised.quantise(plain[name], (rows, cols))
            spread = scales.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: weight.shape[0], : weight.shape[1]]
            assert torch.equal(got, weight.float() * spread), name
        else:
            assert torch.equal(got, plain[name].float()), name


@pytest.fixture
def llama(tmp_path):
    return quantised.fp8(models.save_tiny("llama", tmp_path / "llama", **SIZES), block=(8, 16))


@pytest.mark.world_size(2)
def test_a_rank_reads_its_blocks_alone(llama):
    from zero_sft import load_model

    model = load_model(str(llama), ds_config=models.zero3())
    total = sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    assert model.load_report.bytes_read < 0.62 * total


@pytest.mark.world_size(2)
def test_the_export_is_plain(llama, tmp_path):
    from zero_sft import load_model, save_pretrained

    reference = models.plain(llama, torch.bfloat16)
    model = load_model(str(llama), ds_config=models.zero3())
    save_pretrained(model, tmp_path / "out")
    del model
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = models.plain(tmp_path / "out", torch.bfloat16)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in reference.state_dict().items())


def quantised_load(folder, settings):
    from zero_sft import load_model

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    load_model(str(folder), ds_config=models.zero3())


@pytest.mark.parametrize(
    ("settings", "code", "value"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_unsupported", "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization_unsupported", "bitsandbytes"),
        ({"quant_method": "nobody_knows"}, "quantization_unknown", "nobody_knows"),
        ({"bits": 4}, "quantization_unknown", "None"),
    ],
)
def test_formats_that_transformers_does_not_dequantise(llama, settings, code, value):
    with raises(f"checkpoint.{code}", value):
        quantised_load(llama, settings)


def test_scales_that_fit_no_block(llama):
    from safetensors.torch import save_file

    for path in llama.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight_scale_inv"
        if name in tensors:
            tensors[name] = torch.ones(7, 3)
            save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    with raises("checkpoint.not_convertible", "up_proj", "[7, 3]"):
        quantised_load(llama, config["quantization_config"])


def test_eight_bits_without_scales(llama):
    with raises("checkpoint.scales_missing", "F8_E4M3"):
        quantised_load(llama, None)


@pytest.mark.parametrize("settings", ["fp8", ["fp8"], {"quant_method": ["fp8"]}, 3])
def test_a_quantization_config_that_is_none(llama, settings):
    code = "checkpoint.quantization_unknown" if isinstance(settings, dict) else "config.bad_quantization_config"
    with raises(code, "fp8" if "fp8" in str(settings) else "3"):
        quantised_load(llama, settings)


@pytest.fixture
def gpt_oss(tmp_path):
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=3, vocab_size=131, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "gpt_oss")
    return quantised.mxfp4(tmp_path / "gpt_oss")


@pytest.mark.world_size(1, 2, 3)
def test_what_can_not_be_traced_is_computed_once_a_node(gpt_oss):
    from pathlib import Path

    from zero_sft import load_model
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.cluster.world import World

    reference = models.plain(gpt_oss, torch.bfloat16)
    model = load_model(str(gpt_oss), ds_config=models.zero3(), verify=True)
    models.assert_equal(model, reference, cast=torch.bfloat16)
    report = model.load_report
    assert [name.rsplit(".", 1)[1] for name, _ in report.untraceable_keys] == ["down_proj", "gate_up_proj"] * 2
    assert all(peak > 0 for _, peak in report.untraceable_keys)
    read = all_gather_json(World.detect(), report.bytes_read)
    stored = sum(path.stat().st_size for path in gpt_oss.glob("*.safetensors"))
    assert sum(read) < 1.05 * stored
    assert not list(Path("/dev/shm").glob("zero_sft-*"))
