"""From a load to an export on devices: answers before an engine, its steps next to a stock-loaded model's, the job."""

import json

import pytest
import torch

from tests import models, small_job
from tests.gpu.devices import Cases, device, plain

pytestmark = pytest.mark.gpu

# DeepSpeed's fused Adam would be compiled first, a minute that needs nvcc.
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}


@pytest.fixture
def checkpoints(tmp_path):
    return {name: models.save_tiny(name, tmp_path / name) for name in ("llama", "mixtral")}


def steps(engine, count=3):
    """The losses of that many steps on one batch."""
    ids = torch.arange(3, 19, device=device()).view(1, 16)
    losses = []
    for _ in range(count):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


@pytest.mark.world_size(1, 2, 8)
def test_an_engine_trains_what_was_loaded(checkpoints):
    """As it trains a stock-loaded model; kernels that add in any order leave a difference of rounding."""
    import deepspeed

    from zero_sft import load_model

    cases = Cases()
    ds = models.zero3(train_micro_batch_size_per_gpu=1, optimizer=ADAMW)
    for name, folder in checkpoints.items():
        with cases.case(name):
            losses = {}
            for loader in ("sharded", "stock"):
                torch.manual_seed(0)
                model = load_model(str(folder), ds_config=ds, loader=loader)
                engine, *_ = deepspeed.initialize(model=model, config=ds)
                losses[loader] = steps(engine)
                engine.destroy()
            assert losses["sharded"] == pytest.approx(losses["stock"], rel=5e-3)
            assert losses["sharded"][-1] < losses["sharded"][0]
    cases.require_all()


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("offload", [False, True])
def test_it_answers_before_an_engine_and_is_exported_after_steps(checkpoints, tmp_path, offload):
    """The export is what the engine computes with: gathered from it, and opened by plain `from_pretrained`."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    from zero_sft import load_model, save_pretrained

    cases = Cases()
    sections = {"offload_param": {"device": "cpu", "pin_memory": True}} if offload else {}
    ds = models.zero3(train_micro_batch_size_per_gpu=1, zero_optimization=sections, optimizer=ADAMW)
    if offload:  # the optimizer's own memory stays on the device
        ds["zero_force_ds_cpu_optimizer"] = False
    for name, folder in checkpoints.items():
        original = plain(folder, torch.bfloat16).to(device())
        with cases.case(name):
            model = load_model(str(folder), ds_config=ds)
            ids = torch.arange(3, 11, device=device()).view(1, 8)
            options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
            expected = original.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found = model.generate(ids, attention_mask=torch.ones_like(ids), synced_gpus=True, **options)
            assert found.tolist() == expected.tolist()
            engine, *_ = deepspeed.initialize(model=model, config=ds)
            steps(engine)
            out = tmp_path / f"{name}-{offload}"
            save_pretrained(engine, out)
            exported = plain(out, torch.bfloat16)
            before = dict(original.named_parameters())
            changed = 0
            for key, param in engine.module.named_parameters():
                with GatheredParameters([param]):
                    assert torch.equal(param.detach().cpu(), exported.get_parameter(key)), key
                    changed += not torch.equal(param.detach(), before[key].to(param.device))
            assert changed
            engine.destroy()
    cases.require_all()


@pytest.fixture
def job(tmp_path):
    folder = small_job.make(tmp_path, 24)
    (folder / "prompts.txt").write_text("1?\n2?\n")
    return folder


@pytest.mark.world_size(1, 2, timeout_s=240)
def test_the_job(job):
    """Packed, answering before and after, saving a checkpoint; resumed from it, the run ends as it did."""
    from transformers import AutoTokenizer

    arguments = {
        "bf16": True, "packing": True, "model_max_length": 256, "per_device_train_batch_size": 1, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "sample_prompts": job / "prompts.txt", "data_cache_dir": job / "cache",
    }  # fmt: skip
    small_job.train(job, "out", **arguments)
    small_job.train(job, "again", **arguments, resume_from_checkpoint=job / "out" / "checkpoint-2")
    whole, resumed = (small_job.losses(job, name) for name in ("out", "again"))
    assert len(whole) == 4
    assert whole[-1] < whole[0]
    assert resumed[-2:] == pytest.approx(whole[-2:], rel=1e-2)
    model = plain(job / "out", torch.bfloat16).to(device())
    tokenizer = AutoTokenizer.from_pretrained(job / "out")
    ids = tokenizer("1?", return_tensors="pt").input_ids.to(device())
    assert model(ids).logits.isfinite().all()
    answers = json.loads((job / "out" / "logs" / "answers.json").read_text())
    assert len(answers) == 2
