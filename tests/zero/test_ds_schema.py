"""DeepSpeed configs that DeepSpeed refuses, or whose keys it would ignore: named before anything is read."""

import pytest

from zero_sft.ds_config import load_ds_config, shipped_names, without_auto
from zero_sft.zero.ds_schema import schema_problems

ZERO = {"zero_optimization": {"stage": 3}}


WRONG = {
    # the config's part → the code, what the message must name
    "misspelt key": ({"gradient_cliping": 1.0}, "unknown_key", ("gradient_cliping", "gradient_clipping")),
    "key in the wrong place": ({"overlap_comm": True}, "unknown_key", ("overlap_comm", "zero_optimization")),
    "misspelt in zero": (
        {"zero_optimization": {"stage": 3, "overlap_com": True}}, "unknown_key", ("overlap_com:", "overlap_comm?")
    ),
    "unknown in zero": ({"zero_optimization": {"stage": 3, "nosuch": 1}}, "unknown_key", ("zero_optimization.nosuch",)),
    "type in zero": (
        {"zero_optimization": {"stage": 3, "overlap_comm": "perhaps"}}, "bad_value", ("overlap_comm", "'perhaps'")
    ),
    "nested": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "bad_value",
        ("zero_optimization.offload_param.device", "'disk'"),
    ),
    "removed": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "bad_value", ("MiCS", "mics_shard_size")),
    "removed section": ({"elasticity": {"enabled": True}}, "bad_value", ("elasticity",)),
    "section is no section": ({"optimizer": "adam"}, "bad_value", ("optimizer", "'adam'", "{...}")),
    "number": ({"gradient_clipping": "1.0"}, "bad_value", ("gradient_clipping", "'1.0'")),
    "flag": ({"wall_clock_breakdown": "yes"}, "bad_value", ("wall_clock_breakdown", "'yes'", "true", "false")),
    "dtype": ({"communication_data_type": "int3"}, "bad_value", ("communication_data_type", "int3")),
    "bf16 key": ({"bf16": {"enabled": True, "loss_scale": 1}}, "unknown_key", ("bf16.loss_scale",)),
    "optimizer type": ({"optimizer": {"type": "AdamX"}}, "bad_value", ("optimizer.type", "'AdamX'", "adamw")),
    "optimizer setting": (
        {"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "unknown_setting", ("params.learning_rate", "lr")
    ),
    "max_grad_norm": (
        {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "max_grad_norm",
        ("optimizer.params.max_grad_norm", "gradient_clipping"),
    ),
    "schedule type": ({"scheduler": {"type": "WarmUpLR"}}, "bad_value", ("scheduler.type", "'WarmUpLR'", "WarmupLR")),
    "schedule setting": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup": 1}}}, "unknown_setting", ("params.warmup", "warmup_num_steps")
    ),
    "no steps": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 0}}}, "bad_value",
        ("params.total_num_steps", "0", '"auto"'),
    ),
    "section in zero": ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "bad_value", ("offload_param", "'cpu'")),
    "data types": ({"data_types": {"grad_accum_dtype": "fp64"}}, "bad_value", ("grad_accum_dtype", "'fp64'", "fp32")),
    "data type": ({"data_types": {"param_dtype": ["bf16"]}}, "bad_value", ("data_types.param_dtype", "fp32")),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "unsupported_feature", ("autotp_size is 2", "ZeRO-3")),
    "tp": ({"tensor_parallel": {"tp": {"tp_size": 4}}}, "unsupported_feature", ("tensor_parallel.tp.tp_size is 4",)),
    "sequences": ({"sequence_parallel_size": 2}, "unsupported_feature", ("sequence_parallel_size is 2",)),
    "experts": ({"expert_parallel": {"enabled": True}}, "unsupported_feature", ("expert_parallel.enabled",)),
    "aio": ({"aio": {"threads": 1}}, "unknown_key", ("aio.threads",)),
    "checkpointing": (
        {"activation_checkpointing": {"partition": True}}, "unknown_key", ("activation_checkpointing.partition",)
    ),
    "tensorboard": (
        {"tensorboard": {"enabled": True}}, "package_missing", ("tensorboard.enabled", "pip install tensorboard")
    ),
    "wandb": ({"wandb": {"enabled": True}}, "package_missing", ("wandb.enabled", "pip install wandb")),
    "comet": ({"comet": {"enabled": True}}, "package_missing", ("comet.enabled", "pip install comet_ml")),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_each_mistake_is_named(fault, monkeypatch):
    monkeypatch.setattr("zero_sft.zero.ds_schema.find_spec", lambda name: None)
    part, code, values = WRONG[fault]
    (problem,) = schema_problems({**ZERO, **part})
    assert problem.code == f"ds_config.{code}", problem
    for value in values:
        assert value in str(problem), problem


def test_nvme_without_its_operator(monkeypatch, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}}}
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    (problem,) = schema_problems(config)
    assert problem.code == "ds_config.nvme_needs_libaio"
    assert "offload_param.device" in str(problem)
    assert "libaio-dev" in str(problem)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    assert schema_problems(config) == []


@pytest.mark.parametrize(
    "part",
    [
        {"tensor_parallel": {"autotp_size": 1}}, {"tensor_parallel": {}}, {"sequence_parallel_size": 1}, {"data_types": {}},
        {"data_types": {"grad_accum_dtype": "float32", "param_dtype": None}}, {"expert_parallel": {"enabled": False}},
    ],
)  # fmt: skip
def test_what_asks_for_nothing_passes(part):
    assert schema_problems({**ZERO, **part}) == []


def test_all_mistakes_are_listed():
    problems = schema_problems({
        "zero_optimization": {"stage": 3, "nosuch": 1, "reduce_bucket_size": -1}, "gradient_cliping": 1.0,
        "wall_clock_breakdown": 3, "comms_logger": {"enabled": True, "other": 1},
    })  # fmt: skip
    assert sorted(problem.code.removeprefix("ds_config.") for problem in problems) == ["bad_value"] * 2 + ["unknown_key"] * 3
    for key in ("nosuch", "reduce_bucket_size", "gradient_cliping", "wall_clock_breakdown", "comms_logger.other"):
        assert sum(key in str(problem) for problem in problems) == 1, key


@pytest.mark.parametrize("name", shipped_names())
def test_the_shipped_configs_have_none(name, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    config = load_ds_config(name)
    config["zero_optimization"].pop("zero_hpz_partition_size", None)
    assert schema_problems(without_auto(config)) == []


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
