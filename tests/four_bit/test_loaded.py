"""A model in 4 bits has bitsandbytes' own bytes, computes and learns as one that transformers quantises."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import models
from tests.adapters.test_attach import IDS, LR, options, save_calm
from tests.errors import raises
from tests.slow import slow
from zero_sft.adapters.attach import add_adapters, lora_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def folder(request, tmp_path):
    kind = request.node.callspec.params.get("kind", "llama") if hasattr(request.node, "callspec") else "llama"
    return save_calm(kind, tmp_path / kind, **({"dropout": 0.0} if kind == "opt" else {}))


def plain(folder, dtype, *, quant_type="nf4", double=True):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")


def loaded(folder, dtype, *, quant_type="nf4", double=True, **sections):
    from zero_sft import load_model

    ds = models.zero3(
        bf16=dtype is torch.bfloat16,
        train_micro_batch_size_per_gpu=1,
        optimizer={"type": "SGD", "params": {"lr": LR}},
        zero_allow_untested_optimizer=True,
        gradient_clipping=0.0,
        **sections,
    )
    model = load_model(
        str(folder), ds_config=ds, dtype=dtype, load_in_4bit=True, bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    return model, ds


def expected_bytes(weight):
    """The parts of bitsandbytes' own weight: codes, scales, and what double quantisation adds."""
    state = weight.quant_state
    parts = [weight.detach().reshape(-1), state.absmax]
    if state.nested:
        parts += [state.state2.absmax, state.offset.reshape(1)]
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


@pytest.mark.world_size(3)
@pytest.mark.parametrize(
    ("kind", "dtype", "quant_type", "double"),
    [
        ("llama", "bf16", "nf4", True),
        slow("llama", "fp32", "fp4", False),
        slow("llama", "bf16", "nf4", False),
        slow("qwen2", "fp32", "nf4", True),  # biases, and tied embeddings
        slow("opt", "bf16", "fp4", True),
        slow("mixtral", "bf16", "nf4", True),  # experts stay in 16 bits, as in transformers
    ],
)
def test_the_bytes_and_the_outputs_are_those_of_bitsandbytes(folder, kind, dtype, quant_type, double):
    reference = plain(folder, DTYPES[dtype], quant_type=quant_type, double=double)
    # In evaluation, bitsandbytes repacks weights for its CPU kernels, which don't take these sizes.
    reference.train()
    in_4_bits = {name: module for name, module in reference.named_modules() if type(module).__name__ == "Linear4bit"}
    model, _ = loaded(folder, DTYPES[dtype], quant_type=quant_type, double=double)
    assert sorted(f"{name}.weight" for name in in_4_bits) == model.load_report.quantized_keys
    for name, module in in_4_bits.items():
        expected = expected_bytes(module.weight)
        stored = models.gather_full(model.get_submodule(name).weight).view(-1).view(torch.uint8)
        assert torch.equal(stored[: len(expected)], expected), name
    assert model.num_parameters() == sum(
        param.quant_state.shape.numel() if hasattr(param, "quant_state") else param.numel() for param in reference.parameters()
    )
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, reference(input_ids=IDS).logits, **close)


def trained(folder, given, steps=3):
    """The adapter after some steps of PEFT on transformers' quantised model."""
    from peft import get_peft_model

    from zero_sft.adapters.peft_internals import saved_tensors

    model = plain(folder, torch.float32)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(11)
        adapted = get_peft_model(model, lora_config(options(**given)))
    adapted.train()
    optimizer = torch.optim.SGD([param for param in adapted.parameters() if param.requires_grad], lr=LR)
    before = {name: tensor.detach().clone() for name, tensor in saved_tensors(adapted).items()}
    for _ in range(steps):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, {name: tensor.detach() for name, tensor in saved_tensors(adapted).items()}


SECTIONS = {
    "plain": {},
    "offloaded": {"zero_optimization": {"offload_param": {"device": "cpu"}}},
    "persistent": {"zero_optimization": {"stage3_param_persistence_threshold": 2000}},
}


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("kind", "given", "sections", "checkpointing"),
    [
        ("llama", {"lora_r": 4, "lora_target_modules": ["all-linear"]}, "plain", True),
        slow("llama", {"lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]}, "offloaded", False),
        slow("llama", {"lora_r": 4, "lora_target_modules": ["all-linear"]}, "persistent", True),
        slow("opt", {"lora_r": 4, "lora_bias": "all"}, "plain", False),
    ],
)
def test_three_steps_are_those_of_peft(folder, kind, given, sections, checkpointing):
    import deepspeed

    from zero_sft.adapters.peft_internals import saved_tensors

    before, after = trained(folder, given)
    model, ds = loaded(folder, torch.float32, **SECTIONS[sections])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = add_adapters(model, lora_config(options(**given)), seed=11)
    for name, tensor in saved_tensors(adapted).items():
        assert torch.equal(models.gather_full(tensor), before[name]), name
    params = [param for param in adapted.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=adapted, config=ds, model_parameters=params)
    for _ in range(3):
        engine.backward(engine(input_ids=IDS, labels=IDS).loss)
        engine.step()
    moved = 0.0
    for name, tensor in saved_tensors(adapted).items():
        full = models.gather_full(tensor)
        moved = max(moved, float((full - before[name]).abs().max()))
        torch.testing.assert_close(full, after[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert moved > 1e-3


@pytest.mark.world_size(2)
def test_the_gathered_codes_are_not_kept_for_backward(folder):
    model, _ = loaded(folder, torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    seen = []

    def pack(tensor):
        seen.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.zeros(1, 2, layer.in_features, requires_grad=True)
        layer(x)
    assert seen == []


@pytest.mark.world_size(2)
def test_it_is_neither_saved_as_a_model_nor_merged(folder, tmp_path):
    import zero_sft
    from zero_sft.adapters.merge import require_mergeable

    model, _ = loaded(folder, torch.bfloat16)
    with raises("export.in_4_bits", "Save its adapter"):
        zero_sft.save_pretrained(model, tmp_path / "out")
    adapted = add_adapters(model, lora_config(options(lora_r=2)), seed=1)
    with raises("adapter.not_mergeable", "4 bits"):
        require_mergeable(adapted)


@pytest.mark.world_size(1)
def test_what_can_not_be_trained_in_4_bits(folder):
    model, _ = loaded(folder, torch.bfloat16)
    with raises("adapter.trains_4_bits", "q_proj"):
        add_adapters(model, lora_config(options(lora_r=2, lora_modules_to_save=["q_proj"])), seed=1)
    model, _ = loaded(folder, torch.bfloat16)
    with raises("adapter.dora_in_4_bits", "DoRA"):
        add_adapters(model, lora_config(options(lora_r=2, use_dora=True)), seed=1)


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"loader": "stock"}, "arguments.contradiction"),
        ({"verify": True}, "arguments.contradiction"),
    ],
)
def test_options_that_exclude_each_other(folder, given, code):
    from zero_sft import load_model

    with raises(code, "load_in_4bit"):
        load_model(str(folder), ds_config=models.zero3(), load_in_4bit=True, **given)


@pytest.mark.world_size(1)
def test_a_config_that_quantises_gathers_is_refused(folder):
    with raises("ds_config.quantises_4_bits", "zero_quantized_weights"):
        loaded(folder, torch.bfloat16, zero_optimization={"stage": 3, "zero_quantized_weights": True})
