"""DeepSpeed configs that DeepSpeed refuses, or whose keys it would ignore: named before anything is read."""

import pytest

from zero_sft.ds_config import load_ds_config, shipped_names, without_auto
from zero_sft.zero.ds_schema import schema_problems

ZERO = {"zero_optimization": {"stage": 3}}


def problems_of(config):
    """The sentences of the problems."""
    return [str(problem) for problem in schema_problems(config)]


WRONG = {
    # the config's part → what the message must name
    "misspelt key": ({"gradient_cliping": 1.0}, ("gradient_cliping", "Did you mean gradient_clipping?")),
    "key in the wrong place": ({"overlap_comm": True}, ("overlap_comm", "belongs into zero_optimization")),
    "misspelt in zero": ({"zero_optimization": {"stage": 3, "overlap_com": True}}, ("Did you mean overlap_comm?",)),
    "unknown in zero": ({"zero_optimization": {"stage": 3, "nosuch": 1}}, ("zero_optimization.nosuch",)),
    "type in zero": ({"zero_optimization": {"stage": 3, "overlap_comm": "perhaps"}}, ("overlap_comm", "'perhaps'")),
    "nested": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
        ("zero_optimization.offload_param.device", "'disk'"),
    ),
    "removed": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ("MiCS", "mics_shard_size")),
    "removed section": ({"elasticity": {"enabled": True}}, ("Elastic training has been removed",)),
    "section is no section": ({"optimizer": "adam"}, ("optimizer is 'adam'", "{...}")),
    "number": ({"gradient_clipping": "1.0"}, ("gradient_clipping is '1.0'", "a number")),
    "flag": ({"wall_clock_breakdown": "yes"}, ("wall_clock_breakdown is 'yes'", "true or false")),
    "dtype": ({"communication_data_type": "int3"}, ("communication_data_type", "int3")),
    "bf16 key": ({"bf16": {"enabled": True, "loss_scale": 1}}, ("bf16.loss_scale",)),
    "optimizer type": ({"optimizer": {"type": "AdamX"}}, ("'AdamX'", "adamw")),
    "optimizer setting": ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, ("params.learning_rate", "lr")),
    "max_grad_norm": ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, ("gradient_clipping",)),
    "schedule type": ({"scheduler": {"type": "WarmUpLR"}}, ("'WarmUpLR'", "WarmupLR")),
    "schedule setting": ({"scheduler": {"type": "WarmupLR", "params": {"warmup": 1}}}, ("params.warmup", "warmup_num_steps")),
    "no steps": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 0}}}, ("total_num_steps is 0", '"auto"')
    ),
    "aio": ({"aio": {"threads": 1}}, ("aio.threads",)),
    "checkpointing": ({"activation_checkpointing": {"partition": True}}, ("activation_checkpointing.partition",)),
    "tensorboard": ({"tensorboard": {"enabled": True}}, ("tensorboard.enabled is true", "pip install tensorboard")),
    "wandb": ({"wandb": {"enabled": True}}, ("wandb.enabled is true", "pip install wandb")),
    "comet": ({"comet": {"enabled": True}}, ("comet.enabled is true", "pip install comet_ml")),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_each_mistake_is_named(fault, monkeypatch):
    monkeypatch.setattr("zero_sft.zero.ds_schema.find_spec", lambda name: None)
    part, texts = WRONG[fault]
    problems = problems_of({**ZERO, **part})
    assert len(problems) == 1
    for text in texts:
        assert text in problems[0], problems


def test_nvme_without_its_operator(monkeypatch, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    (problem,) = problems_of(config)
    assert "offload_param.device is 'nvme'" in problem
    assert "libaio-dev" in problem
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    assert problems_of(config) == []


def test_all_mistakes_are_listed():
    problems = problems_of({
        "zero_optimization": {"stage": 3, "nosuch": 1, "reduce_bucket_size": -1}, "gradient_cliping": 1.0,
        "wall_clock_breakdown": 3, "comms_logger": {"enabled": True, "other": 1},
    })  # fmt: skip
    assert len(problems) == 5
    for text in ("nosuch", "reduce_bucket_size", "gradient_cliping", "wall_clock_breakdown", "comms_logger.other"):
        assert sum(text in problem for problem in problems) == 1, text


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_configs_have_none(name, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    config = load_ds_config(name)
    config["zero_optimization"].pop("zero_hpz_partition_size", None)
    assert problems_of(without_auto(config)) == []


def test_every_key_that_deepspeeds_parser_reads_is_known():
    """The reference is the parser itself: a dict that notes what is asked of it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    from zero_sft.zero import ds_schema

    class Noting(dict):
        asked: set = set()  # noqa: RUF012 - all copies share it

        def get(self, key, default=None):
            self.asked.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            self.asked.add(key)
            return super().__getitem__(key)

        def __contains__(self, key):
            self.asked.add(key)
            return super().__contains__(key)

        def __copy__(self):
            return Noting(self)

    DeepSpeedConfig(Noting({**ZERO, "train_micro_batch_size_per_gpu": 1}))
    known = ds_schema.SECTIONS | ds_schema.FLAGS | ds_schema.NUMBERS | ds_schema.TEXTS | ds_schema._removed()
    assert Noting.asked - known - {"bfloat16"} == set()  # `load_ds_config` renames that one
