"""The DeepSpeed config against the arguments: what is filled, what is listed; the reference is transformers' own comparison."""

import copy
import re

import pytest

from tests.errors import raises
from zero_sft.arguments import build_training_arguments, parse
from zero_sft.arguments.ds_conflicts import count_steps, find_schedule_contradictions, with_auto_for_absent_keys
from zero_sft.ds_config import load_ds_config

ZERO = {"zero_optimization": {"stage": 3}}
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}

PUBLISHED = {
    # transformers' docs, "ZeRO-3"
    "transformers": {
        "fp16": {
            "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "optimizer": ADAMW,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
            "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    },
    # keys of older releases, and those of stage 2
    "older": {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3, "allgather_partitions": True, "allgather_bucket_size": 2e8, "reduce_scatter": True,
            "round_robin_gradients": True, "stage3_gather_fp16_weights_on_model_save": True,
        },
        "steps_per_print": 100, "zero_allow_untested_optimizer": True, "prescale_gradients": False, "dump_state": False,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    },
    "activation checkpointing, decaying": {
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 32},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "profile": False},
        "zero_optimization": {"stage": 3, "offload_optimizer": None, "offload_param": None},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "total_num_steps": "auto"}},
        "flops_profiler": {"enabled": False, "profile_step": 1}, "aio": {"block_size": 1048576},
        "comms_logger": {"enabled": False}, "_comment": "copied",
    },
}  # fmt: skip


def built(config: dict, *argv: str):
    """The Trainer's arguments of a config that is taken."""
    parsed = parse([*argv, "--output_dir", "out"])
    return build_training_arguments(parsed.training, load_ds_config(config), parsed.given_names)


CONFLICTS = {
    # code: config, arguments, what the message must name
    "contradicts_argument": [
        (
            {"train_batch_size": 44}, (),
            ("train_batch_size", "44", "16", "--per_device_train_batch_size 8", "2 ranks", '"auto"'),
        ),
        (
            {"train_micro_batch_size_per_gpu": 44}, (),
            ("train_micro_batch_size_per_gpu", "44", "8", "--per_device_train_batch_size"),
        ),
        ({"gradient_accumulation_steps": 22}, (), ("gradient_accumulation_steps", "22", "--gradient_accumulation_steps")),
        ({"gradient_clipping": 0.5}, (), ("gradient_clipping", "0.5", "1.0", "--max_grad_norm")),
        ({"bf16": {"enabled": False}}, (), ("bf16.enabled", "False", "--bf16")),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, (), ("optimizer.params.lr", "0.001", "--learning_rate")),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9]}}}, (), ("params.betas", "[0.8, 0.9]", "--adam_beta1")),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, (), ("optimizer.params.eps", "1e-06", "--adam_epsilon")),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, (), ("weight_decay", "0.1", "--weight_decay")),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
            (),
            ("params.warmup_max_lr", "0.001", "--learning_rate"),
        ),
    ],
    "other_optimizer": [
        ({"optimizer": ADAMW}, ("--optim", "sgd"), ("optimizer.type", "'AdamW'", "--optim", "'sgd'")),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": True}, ("--optim", "sgd"), ("zero_force_ds_cpu_optimizer", "--optim sgd")),
    ],
    "other_schedule": [
        (
            {"scheduler": {"type": "WarmupDecayLR"}},
            ("--lr_scheduler_type", "cosine"),
            ("scheduler.type", "'WarmupDecayLR'", "--lr_scheduler_type", "'cosine'"),
        ),
        ({"scheduler": {"type": "OneCycle"}}, ("--warmup_steps", "5"), ("scheduler.type", "'OneCycle'", "--warmup_steps")),
    ],
}  # fmt: skip


@pytest.mark.world_size(2)
def test_contradictions_are_listed_with_both_values_and_the_remedy():
    for code, rows in CONFLICTS.items():
        for config, argv, values in rows:
            with raises(f"ds_config.{code}", *values):
                built({**ZERO, **config}, *argv)
    everything = {"gradient_clipping": 0.5, "train_batch_size": 44, "optimizer": {"type": "AdamW", "params": {"lr": 0.25}}}
    with raises(
        "ds_config.contradictions", "gradient_clipping", "0.5", "train_batch_size", "44", "params.lr", "0.25"
    ) as caught:
        built({**ZERO, **everything})
    assert caught.value.codes[1:] == ("ds_config.contradicts_argument",) * 3


@pytest.mark.world_size(1)
def test_everything_that_transformers_compares_is_compared():
    """The reference: transformers' own list of mismatches, which it raises once the weights are loaded."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = built(ZERO)
    config = {
        **ZERO, "train_batch_size": 999, "train_micro_batch_size_per_gpu": 333, "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.25, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.1, 0.2], "eps": 1.0, "weight_decay": 0.5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3.0}},
    }  # fmt: skip
    theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(config))
    theirs.trainer_config_process(arguments)
    keys = [line.split()[2].split("=")[0] for line in theirs.mismatches]
    assert len(keys) == 10
    with raises("ds_config.contradictions", *(f"- {key} " for key in keys)) as caught:
        built(config)
    assert set(caught.value.codes[1:]) == {"ds_config.contradicts_argument"}


@pytest.mark.world_size(2)
def test_published_configs_are_taken():
    for name, config in PUBLISHED.items():
        arguments = built(config)
        result = arguments.hf_deepspeed_config.config
        assert result["train_batch_size"] == 16, name
        assert result["gradient_clipping"] == 1.0, name
        assert (result["bf16"]["enabled"], result["fp16"]["enabled"]) == (True, False), name


AUTO = {
    # the key in the message, and the config's part
    "zero_optimization.sub_group_size": {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}},
    "zero_optimization.offload_param": {"zero_optimization": {"stage": 3, "offload_param": "auto"}},
    "zero_optimization.offload_optimizer.device": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "auto"}}
    },
    "wall_clock_breakdown": {"wall_clock_breakdown": "auto"},
    "prescale_gradients": {"prescale_gradients": "auto"},
    "fp16.loss_scale": {"fp16": {"enabled": "auto", "loss_scale": "auto"}},
    "optimizer": {"optimizer": "auto"},
    "optimizer.params.eps": {"optimizer": {"type": "Lion", "params": {"eps": "auto"}}},
    "scheduler.params.total_num_steps": {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": "auto"}}},
    "gradient_cliping": {"gradient_cliping": "auto"},
}  # fmt: skip


@pytest.mark.world_size(1)
def test_an_auto_that_nothing_fills_is_refused():
    """accelerate raises at it when the engine starts: the reference."""
    from accelerate.utils import DeepSpeedPlugin

    for key, part in AUTO.items():
        with raises("ds_config.auto_not_filled", f'{key} is "auto"'):
            built({**ZERO, **part})
    for key in ("wall_clock_breakdown", "prescale_gradients"):
        with pytest.raises(ValueError, match=key):
            DeepSpeedPlugin(hf_ds_config={**ZERO, key: "auto"}).deepspeed_config_process(must_match=False)
    built({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}, "steps_per_print": "auto"})


@pytest.mark.world_size(1)
@pytest.mark.slow
def test_what_the_config_leaves_open_follows_the_arguments():
    """Without these keys DeepSpeed's own defaults would run: no clipping, a learning rate of 0.001, fp32."""
    config = {**ZERO, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    result = built(config, "--max_grad_norm", "0.3", "--learning_rate", "3e-5").hf_deepspeed_config.config
    assert result["gradient_clipping"] == 0.3
    assert result["optimizer"]["params"] == {"lr": 3e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert result["scheduler"]["params"]["warmup_max_lr"] == 3e-5
    assert result["bf16"]["enabled"] is True
    assert config == {**ZERO, "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}


@pytest.mark.world_size(1)
@pytest.mark.slow
def test_the_number_of_steps():
    """`total_num_steps` is known once the data is prepared; 0 is refused by DeepSpeed itself."""
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 7, "warmup_num_steps": 2}}
    arguments = built({**ZERO, "scheduler": schedule}, "--warmup_steps", "2")
    config = arguments.hf_deepspeed_config.config
    (problem,) = find_schedule_contradictions(config, arguments, 5, set())
    assert problem.code == "ds_config.contradicts_argument"
    assert re.findall(r"[\w.]+_num_steps|\d+", str(problem)) == ["scheduler.params.total_num_steps", "7", "5"]
    assert find_schedule_contradictions(config, arguments, 7, set()) == []
    with raises("ds_config.contradictions", "params.total_num_steps", "7", "5", "params.warmup_num_steps", "2", "3") as caught:
        built({**ZERO, "scheduler": schedule}, "--warmup_steps", "3", "--max_steps", "5")
    assert caught.value.codes[1:] == ("ds_config.contradicts_argument",) * 2
    schedule["params"]["total_num_steps"] = 0
    with raises("ds_config.bad_value", "params.total_num_steps", "0"):
        built({**ZERO, "scheduler": schedule}, "--warmup_steps", "2")


@pytest.mark.parametrize(
    ("rows", "argv", "ranks", "steps"),
    [
        (24, ("--per_device_train_batch_size", "2", "--num_train_epochs", "1"), 2, 6),
        (23, ("--per_device_train_batch_size", "2", "--num_train_epochs", "3"), 2, 18),
        (23, ("--per_device_train_batch_size", "2", "--num_train_epochs", "1", "--dataloader_drop_last"), 2, 5),
        (10, ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--num_train_epochs", "2"), 1, 6),
        (10, ("--max_steps", "3"), 4, 3),
    ],
)
def test_steps_are_counted_as_the_trainer_does(rows, argv, ranks, steps):
    from types import SimpleNamespace

    defaults = {
        "max_steps": -1, "dataloader_drop_last": False, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "num_train_epochs": 3.0,
    }  # fmt: skip
    arguments: object = SimpleNamespace(**{**defaults, **parse(argv).training})
    assert count_steps(rows, arguments, ranks) == steps


# The optimizer.


def test_each_optimizer_stays_what_it_is_under_offload():
    """accelerate makes DeepSpeed's Adam of every optimizer, unless `zero_force_ds_cpu_optimizer` is false."""
    from transformers.training_args import OptimizerNames

    for optim in OptimizerNames:
        config, _ = with_auto_for_absent_keys(OFFLOAD, optim.value)
        same = optim.value in ("adamw_torch", "adamw_torch_fused")
        assert config.get("zero_force_ds_cpu_optimizer", True) is same, optim
        assert "zero_force_ds_cpu_optimizer" not in with_auto_for_absent_keys(ZERO, optim.value)[0]


@pytest.mark.slow
@pytest.mark.world_size(1, timeout_s=280)
def test_losses_are_equal_with_and_without_offload(tmp_path):
    """sgd, rmsprop and adafactor trained as Adam, or failed at the first step."""
    import json

    from tests import small_job

    small_job.make(tmp_path, samples=16)
    seen = {}
    for optim in ("adamw_torch", "sgd", "rmsprop", "adafactor"):
        for name, config in (("plain", ZERO), ("offload", OFFLOAD)):
            small_job.train(
                tmp_path, f"{optim}-{name}", deepspeed=json.dumps(config), optim=optim, max_steps=3,
                per_device_train_batch_size=2, packing=False,
            )  # fmt: skip
        plain, offload = (small_job.losses(tmp_path, f"{optim}-{name}") for name in ("plain", "offload"))
        assert offload == pytest.approx(plain, rel=1e-5), optim
        seen[optim] = plain
    assert len({tuple(round(loss, 4) for loss in losses) for losses in seen.values()}) == len(seen)
