"""The memory of training: beside a measured run, beside DeepSpeed's own estimator, and activations beside real ones."""

import ctypes
import os

import pytest
import torch

from tests import models
from tests.errors import raises
from zero_sft.adapters.options import LoraOptions
from zero_sft.estimate.activations import LiveMemory, peak_bytes
from zero_sft.estimate.engine_memory import Sizes, training_memory, zero_settings
from zero_sft.estimate.memory_needs import MemoryModel, TrainingRun
from zero_sft.estimate.model import find_model
from zero_sft.hub.options import HubOptions
from zero_sft.loading.options import LoadOptions

WIDTH = 768
BUCKETS = {
    "by the model's width": {
        "reduce_bucket_size": WIDTH * WIDTH, "stage3_prefetch_bucket_size": WIDTH * WIDTH,
        "stage3_param_persistence_threshold": 10 * WIDTH,
    },
    "DeepSpeed's own": {},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """94 M parameters, large enough that what the libraries themselves need is small beside them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12, num_key_value_heads=12,
        vocab_size=16000, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


OFFLOADED = {
    "the optimizer to the host": {"offload_optimizer": {"device": "cpu"}},
    "all to the host": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "all to NVMe": {
        "sub_group_size": 20_000_000, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "offload_optimizer": {"device": "nvme", "buffer_count": 4},
        "offload_param": {"device": "nvme", "buffer_count": 24, "buffer_size": 7_000_000, "max_in_cpu": 10_000_000},
    },
}  # fmt: skip


def measured(folder, zero, batch_size, length, checkpointing, lora=None, **load):
    """The most memory of this rank over what it had before the load, in two steps of training.

    A run that trains adapters is checkpointed as TRL does it.
    """
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from testing import probes
    from zero_sft import load_model
    from zero_sft.adapters.attach import add_adapters, lora_config

    if load:
        import bitsandbytes  # noqa: F401 - as PEFT: modules do not count

    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the kernel, so that it can be seen
    libc.mallopt(-1, 2**17)  # M_TRIM_THRESHOLD
    ds = {
        "zero_optimization": {"stage": 3, **zero}, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": batch_size,
    }  # fmt: skip
    with probes.PeakMemory() as peak:
        model = load_model(str(folder), ds_config=ds, **load)
        if lora is not None:
            model = add_adapters(model, lora_config(lora), seed=1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": lora is not None})
        model.train()
        offloaded = "offload_optimizer" in zero  # then DeepSpeed wants an optimizer of its own
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = DeepSpeedCPUAdam(trained) if offloaded else torch.optim.AdamW(trained, fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds)
        tokens = torch.arange(batch_size * length).view(batch_size, length)
        for _ in range(2):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            del loss
            engine.step()
    engine.destroy()
    return peak.growth


def estimated(folder, zero, batch_size, length, checkpointing):
    """The estimate of that run."""
    of = find_model(str(folder), HubOptions())
    sizes = Sizes(
        numels=[each.numel() for each in of.parameters.values()],
        itemsize=2,
        activation_bytes=peak_bytes(of.spec, batch_size=batch_size, length=length, checkpointing=checkpointing),
    )
    return training_memory(sizes, zero_settings({"zero_optimization": {"stage": 3, **zero}}, WIDTH), 2, on_cpu=True)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("buckets", "batch_size", "length", "checkpointing"),
    [
        ("by the model's width", 1, 64, False),
        ("by the model's width", 2, 256, True),
        ("by the model's width", 4, 256, False),
        ("DeepSpeed's own", 2, 256, False),
    ],
)
def test_within_a_tenth_of_a_measured_run(folder, buckets, batch_size, length, checkpointing):
    expected = estimated(folder, BUCKETS[buckets], batch_size, length, checkpointing).device_peak
    found = measured(folder, BUCKETS[buckets], batch_size, length, checkpointing)
    assert abs(expected / found - 1) < 0.1, (os.environ["RANK"], expected / 2**20, found / 2**20)


LORA = LoraOptions(lora_r=16, lora_dropout=0.0, lora_target_modules=["all-linear"])


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("batch_size", "length", "checkpointing", "load"),
    [(8, 256, True, {}), (4, 256, False, {}), (4, 256, True, {"load_in_4bit": True}), (4, 256, False, {"load_in_4bit": True})],
)
def test_adapters_within_a_tenth_of_a_measured_run(folder, batch_size, length, checkpointing, load):
    options = LoadOptions(**load)
    model = MemoryModel(find_model(str(folder), HubOptions()), LORA, options)
    zero = BUCKETS["by the model's width"]
    activations = peak_bytes(
        model.spec, batch_size=batch_size, length=length, checkpointing=checkpointing, lora=LORA, load_options=options
    )
    settings = zero_settings({"zero_optimization": {"stage": 3, **zero}}, WIDTH)
    expected = training_memory(model.sizes(2, activations), settings, 2, on_cpu=True).device_peak
    found = measured(folder, zero, batch_size, length, checkpointing, lora=LORA, **load)
    assert abs(expected / found - 1) < 0.1, (os.environ["RANK"], expected / 2**20, found / 2**20)


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize("where", OFFLOADED)
def test_offloaded_within_a_tenth_of_a_measured_run(folder, tmp_path, where):
    """On CPU ranks device and host are one memory, in which the first step's moments and a pass take turns."""
    if where == "all to NVMe":
        models.require_async_io()
    section = {**BUCKETS["by the model's width"], **OFFLOADED[where]}
    for key in ("offload_optimizer", "offload_param"):
        if section.get(key, {}).get("device") == "nvme":
            section[key] = {**section[key], "nvme_path": str(tmp_path)}
    memory = estimated(folder, section, 2, 256, True)
    moments = memory.host.get("moments of a group, first step", 0)
    passing = sum(memory.phases[memory.longest_phase].values())
    expected = memory.device_peak + memory.host_peak - min(moments, passing)
    found = measured(folder, section, 2, 256, True)
    assert abs(expected / found - 1) < 0.1, (os.environ["RANK"], expected / 2**20, found / 2**20)


def test_activations_on_fakes_are_those_of_real_tensors(folder):
    from transformers import AutoModelForCausalLM

    of = find_model(str(folder), HubOptions())
    faked = peak_bytes(of.spec, batch_size=2, length=128, checkpointing=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    model.config.use_cache = False
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    live = LiveMemory()
    for tensor in (*model.parameters(), *model.buffers()):
        live.leave_out(tensor)
    tokens = torch.arange(256).view(2, 128)
    with live:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert abs(faked / live.peak - 1) < 0.02


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_checkpointing_saves_and_batches_add_up(tmp_path, kind):
    spec = find_model(str(models.save_tiny(kind, tmp_path / kind)), HubOptions()).spec
    one, two = (peak_bytes(spec, batch_size=n, length=64, checkpointing=False) for n in (1, 2))
    assert one < two <= 2 * one
    assert peak_bytes(spec, batch_size=2, length=64, checkpointing=True) < two


def test_states_as_deepspeed_counts_them():
    """DeepSpeed's estimator: 18 bytes a parameter over all GPUs, 2 of them a spare copy, beside 4 of the largest layer."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    numels = [10_000_000] * 64
    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        sum(numels), max(numels), num_gpus_per_node=8, num_nodes=1, cpu_offload=False, cpu_offload_params=False, zero_init=True
    )
    sizes = Sizes(numels=numels, itemsize=2, activation_bytes=0)
    zero = zero_settings({"zero_optimization": {"stage": 3}}, 4096)
    ours = training_memory(sizes, zero, 8).device
    states = sum(ours[key] for key in ("parameters", "gradients", "optimizer"))
    assert states == 16 * sum(numels) // 8
    assert theirs - largest == 18 * sum(numels) // 8


def test_offloaded_states_are_the_hosts():
    sizes = Sizes(numels=[10**9], itemsize=2, activation_bytes=0)
    section = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    memory = training_memory(sizes, zero_settings({"zero_optimization": section}, 4096), 8)
    assert set(memory.device) == {"reduction bucket"}
    assert memory.host == {  # 125 million elements; what is page-locked, by default, takes a power of two
        "parameters": 2**28, "gradients": 2**28, "optimizer": 12 * 10**9 // 8, "gradients in fp32": 2**29
    }  # fmt: skip
    section["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    memory = training_memory(sizes, zero_settings({"zero_optimization": section}, 4096), 8)
    assert memory.host_peak == 2**28 + (2 + 12 + 4) * 10**9 // 8


def test_sub_groups_as_the_engine_closes_them():
    """Each takes parameters until it has reached the size: [5 + 5], [8 + 1 + 1], [4] of 10, on 1 rank; padded on 3."""
    sizes = Sizes(numels=[5, 5, 8, 1, 1, 4], itemsize=2, activation_bytes=0)
    assert sizes.sub_groups(1, 10) == [10, 10, 4]
    assert sizes.sub_groups(3, 10**9) == [2 + 2 + 3 + 1 + 1 + 2]


def run(**changes):
    base = {
        "world_size": 8, "ranks_per_node": 8, "ds_config": "zero3", "batch_size": 4, "length": 512, "checkpointing": False,
        "packing": False, "device_bytes": 80 * 2**30, "host_bytes": 2**40,
    }  # fmt: skip
    return TrainingRun(**{**base, **changes})


def test_remedies_make_it_fit(folder):
    trainer = MemoryModel(find_model(str(folder), HubOptions()))
    roomy = trainer.needs(run())
    assert roomy.fits
    assert next(trainer.remedies(run(device_bytes=roomy.device - 2**26))).startswith("--activation_checkpointing True")
    assert list(trainer.remedies(run(device_bytes=2**20))) == []  # not even the runtime fits
    assert trainer.activation_bytes(run(packing=True)) > trainer.activation_bytes(run())


def test_each_remedy_is_enough_alone(folder):
    """Where no number of GPUs makes room for the activations, checkpointing does, and a number of GPUs is not named."""
    trainer = MemoryModel(find_model(str(folder), HubOptions()))
    tight = run(device_bytes=trainer.needs(run(world_size=8192)).device - 1)
    remedies = list(trainer.remedies(tight))
    assert remedies[0] == "--activation_checkpointing True"
    assert not [remedy for remedy in remedies if "GPUs" in remedy]


def test_a_number_of_gpus_comes_with_the_arguments_it_needs(folder):
    trainer = MemoryModel(find_model(str(folder), HubOptions()))
    cut = run(world_size=64, checkpointing=True, batch_size=1)
    remedies = list(trainer.remedies(run(device_bytes=trainer.needs(cut).device)))
    words = "--activation_checkpointing True --per_device_train_batch_size 1"
    assert remedies[0] == f"64 GPUs with {words}"
    assert all(remedy.startswith(f"{words} --deepspeed ") for remedy in remedies[1:])


def test_a_tied_tensor_counts_once(tmp_path):
    of = find_model(str(models.save_tiny("qwen2", tmp_path / "qwen2")), HubOptions())
    assert of.spec.config.tie_word_embeddings
    assert of.numel == models.plain(tmp_path / "qwen2", torch.bfloat16).num_parameters()


def test_a_config_that_is_not_zero3():
    trainer = MemoryModel(find_model("Llama-3.1-8B", HubOptions()))
    with raises("ds_config.not_stage_3"):
        trainer.needs(run(ds_config={"zero_optimization": {"stage": 2}}))
