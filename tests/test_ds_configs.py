"""Tests of the shipped DeepSpeed configs, their keys in DeepSpeed and docs/configs.md, and of `zero_sft.ds_config`."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from tests.errors import raises
from zero_sft.ds_config import engine_dtype, hpz_size, load_ds_config, require_nvme, resolve_auto, shipped_names
from zero_sft.packaged_file import packaged_file

NAMES = ("zero3", "zero3_nvme", "zero3_offload", "zero3_zeropp")
DOCUMENT = Path(__file__).parents[1] / "docs" / "configs.md"
OFFLOAD = {"offload_param": DeepSpeedZeroOffloadParamConfig, "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig}
STAGE3 = {"zero_optimization": {"stage": 3}}


def with_zero(**settings):
    """Return a stage 3 config with these settings in its `zero_optimization`."""
    return {"zero_optimization": {"stage": 3, **settings}}


def keys_of(value):
    """Yield every key of a config, including those of its sections."""
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(keys_of, value.values()))


def values_of(value):
    """Yield every value of a config that is not a section."""
    return [each for part in value.values() for each in values_of(part)] if isinstance(value, dict) else [value]


def fields_of(model):
    """Return the keys that a DeepSpeed config class reads from a file."""
    return {field.alias or name for name, field in model.model_fields.items()}


# The shipped files.


def test_the_shipped_names():
    assert tuple(shipped_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_file_parses_and_loads_by_name(name):
    written = json.loads(packaged_file("ds_configs", f"{name}.json").read_text(encoding="utf-8"))
    assert written["zero_optimization"]["stage"] == 3
    assert load_ds_config(name) == written


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key_of_zero_optimization(name):
    zero = load_ds_config(name)["zero_optimization"]
    assert set(zero) <= fields_of(DeepSpeedZeroConfig)
    for section, model in OFFLOAD.items():
        assert set(zero.get(section, {})) <= fields_of(model)


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_the_file_without_auto(name):
    zero = resolve_auto(load_ds_config(name), "bfloat16", node_group_size=4, world_size=8)["zero_optimization"]
    accepted = DeepSpeedZeroConfig(**zero)
    assert accepted.stage == 3
    assert accepted.zero_hpz_partition_size == (4 if name == "zero3_zeropp" else 1)
    device = {"zero3_nvme": "nvme", "zero3_offload": "cpu"}.get(name)
    for offload in (accepted.offload_param, accepted.offload_optimizer):
        assert (None if offload is None else offload.device) == device


@pytest.mark.parametrize("name", NAMES)
def test_the_page_explains_every_key(name):
    quoted = set(re.findall(r"`([^`\n]+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert keys_of(load_ds_config(name)) - quoted == set()
    assert name in quoted


def test_the_keys_of_stage_2_for_offload():
    """As DeepSpeed reads them when its engine starts: by then the Trainer has chosen an optimizer that it refuses."""
    former = {"stage": 3, "cpu_offload": True, "cpu_offload_params": True, "cpu_offload_use_pin_memory": True}
    on_cpu = {"device": "cpu", "pin_memory": True}
    assert load_ds_config({"zero_optimization": former})["zero_optimization"] == {
        "stage": 3, "offload_optimizer": on_cpu, "offload_param": on_cpu
    }  # fmt: skip
    given = {"stage": 3, "cpu_offload": True, "offload_optimizer": {"device": "nvme"}}
    assert load_ds_config({"zero_optimization": given})["zero_optimization"]["offload_optimizer"] == {"device": "nvme"}
    assert load_ds_config({"zero_optimization": {"stage": 3, "cpu_offload": False}})["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("name", ["zero3_nvme", "zero3_offload"])
def test_offload_takes_the_trainers_optimizer(name):
    config = load_ds_config(name)
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "optimizer" not in config


def test_nvme_keeps_no_parameter_between_uses():
    """DeepSpeed 0.19.8 runs out of buffers, or assigns one twice, if parameters on NVMe stay gathered."""
    zero = load_ds_config("zero3_nvme")["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 0
    assert not {"pipeline_read", "pipeline_write"} & set(zero["offload_optimizer"])


def test_deepspeed_reads_every_key_of_aio():
    """DeepSpeed silently ignores other keys: no class would refuse them."""
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    assert set(load_ds_config("zero3_nvme")["aio"]) <= set(AIO_DEFAULT_DICT)


# Sources.


def test_a_dict_is_copied():
    config = with_zero(offload_param={"device": "cpu"})
    loaded = load_ds_config(config)
    loaded["zero_optimization"]["offload_param"]["device"] = "none"
    assert config == with_zero(offload_param={"device": "cpu"})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path(tmp_path, kind):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(STAGE3))
    assert load_ds_config(kind(path)) == STAGE3


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text(json.dumps(STAGE3))
    assert load_ds_config("~/mine.json") == STAGE3


def test_a_shipped_name_goes_before_a_file(tmp_path, monkeypatch):
    (tmp_path / "zero3").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "bf16" in load_ds_config("zero3")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"", "line 1"),
        (b"{", "line 1"),
        (b"stage: 3", "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b'{"a": 1,\n}', "comma"),
        (b'{"a": 1, // note\n"b": 2}', "comment"),
        (b'{"zero_optimization": {"stage": 3, "stage": 2}}', "'stage'"),
        (b"[" * 5000, "nested"),
        (b'{"a": ' + b"1" * 6000 + b"}", "thousands of digits"),
    ],
    ids=lambda value: value[:30],
)
def test_not_json(tmp_path, content, value):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with raises("ds_config.not_json", str(path), value):
        load_ds_config(path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(STAGE3), encoding="utf-8-sig")
    assert load_ds_config(path) == STAGE3


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({}, "None"),
        ({"zero_optimization": None}, "None"),
        ({"zero_optimization": {}}, "None"),
        ({"zero_optimization": {"stage": 2}}, "2"),
        ({"zero_optimization": {"stage": "3"}}, "'3'"),
        ([STAGE3], "None"),
    ],
)
def test_not_stage_3(tmp_path, config, stage):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with raises("ds_config.not_stage_3", "zero_optimization.stage", str(stage)) as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value)
    assert ", ".join(NAMES) in str(caught.value)


def test_a_dict_of_another_stage():
    with raises("ds_config.not_stage_3", "ds_config"):
        load_ds_config({"zero_optimization": {"stage": 1}})


def test_an_unknown_name_is_answered_with_the_shipped_ones(tmp_path):
    for source in ("zero4", "zero3.jsn", str(tmp_path)):
        with raises("ds_config.not_found") as caught:
            load_ds_config(source)
        assert repr(source) in str(caught.value)
        assert ", ".join(NAMES) in str(caught.value)


# Values.


@pytest.mark.parametrize(
    ("bf16", "fp16", "wanted", "dtype"),
    [
        ("auto", "auto", "bfloat16", "bfloat16"),
        ("auto", "auto", "float16", "float16"),
        ("auto", "auto", "float32", "float32"),
        (True, "auto", "float16", "bfloat16"),
        ("auto", True, "bfloat16", "bfloat16"),
        ("auto", True, "float32", "float16"),
        (False, True, "bfloat16", "float16"),
        (False, "auto", "bfloat16", "float32"),
        (True, None, "float32", "bfloat16"),
        (None, True, "float32", "float16"),
        (None, "auto", "bfloat16", "float32"),
        (None, None, "bfloat16", "float32"),
        (False, False, "float16", "float32"),
    ],
)
def test_the_engines_dtype(bf16, fp16, wanted, dtype):
    sections = {"bf16": bf16, "fp16": fp16}
    config = STAGE3 | {section: {"enabled": value} for section, value in sections.items() if value is not None}
    assert engine_dtype(config, wanted) == dtype


@pytest.mark.parametrize("section", [None, {}])
def test_an_empty_dtype_section_is_off(section):
    assert engine_dtype(STAGE3 | {"bf16": section}, "bfloat16") == "float32"


@pytest.mark.parametrize("name", NAMES)
def test_concrete_leaves_no_auto(name):
    config = load_ds_config(name)
    before = copy.deepcopy(config)
    result = resolve_auto(config, "float16", node_group_size=2, world_size=4)
    assert "auto" not in values_of(result)
    assert result["train_micro_batch_size_per_gpu"] == 1
    assert (result["bf16"], result["fp16"]) == ({"enabled": False}, {"enabled": True})
    assert config == before


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu"])
def test_concrete_keeps_a_batch_size(key):
    assert resolve_auto(STAGE3 | {key: 16}, "float32", 1, 1) == STAGE3 | {key: 16}


def test_concrete_adds_no_dtype_section():
    assert resolve_auto(STAGE3, "float32", 1, 1) == STAGE3 | {"train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize("settings", [{}, {"zero_hpz_partition_size": 1}])
def test_hpz_is_off(settings):
    assert hpz_size(with_zero(**settings), node_group_size=8, world_size=16) == {}


@pytest.mark.parametrize(
    ("size", "local", "world", "result"),
    [("auto", 8, 16, 8), ("auto", 1, 4, 1), ("auto", 4, 4, 4), (2, 8, 16, 2), (16, 8, 16, 16)],
)
def test_hpz_size(size, local, world, result):
    assert hpz_size(with_zero(zero_hpz_partition_size=size), local, world) == {"zero_hpz_partition_size": result}


@pytest.mark.parametrize(
    ("size", "local", "world"),
    [(3, 8, 16), (32, 8, 16), (0, 8, 16), (-8, 8, 16), (8.0, 8, 16), ("8", 8, 16), (None, 8, 16), ("auto", 3, 8)],
)
def test_hpz_size_that_does_not_fit(size, local, world):
    config = with_zero(zero_hpz_partition_size=size)
    with raises("ds_config.bad_hpz_size", f"{world} ranks") as caught:
        hpz_size(config, local, world)
    assert f"(here {local})" in str(caught.value)
    with raises("ds_config.bad_hpz_size"):
        resolve_auto(config, "float32", local, world)


# The NVMe folder.


@pytest.mark.parametrize("section", OFFLOAD)
def test_nvme_folder(tmp_path, section):
    require_nvme(with_zero(**{section: {"device": "nvme", "nvme_path": str(tmp_path)}}))


@pytest.mark.parametrize("section", OFFLOAD)
@pytest.mark.parametrize("path", ["missing", "", None])
def test_nvme_folder_that_is_missing(tmp_path, section, path):
    path = str(tmp_path / path) if path else path
    with raises("ds_config.nvme_path_unwritable") as caught:
        require_nvme(with_zero(**{section: {"device": "nvme", "nvme_path": path}}))
    assert f"zero_optimization.{section}.nvme_path" in str(caught.value)
    assert not os.listdir(tmp_path)


def test_nvme_folder_that_is_not_named():
    with raises("ds_config.nvme_path_unwritable", "None"):
        require_nvme(with_zero(offload_optimizer={"device": "nvme"}))


def test_the_shipped_nvme_config_with_a_folder_of_ones_own(tmp_path):
    config = load_ds_config("zero3_nvme")
    for section in OFFLOAD:
        config["zero_optimization"][section]["nvme_path"] = str(tmp_path)
    require_nvme(config)


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero3_zeropp"])
def test_no_nvme_no_folder(name):
    require_nvme(load_ds_config(name))
    require_nvme(with_zero(offload_param=None, offload_optimizer={"device": "cpu", "nvme_path": "missing"}))
    require_nvme(with_zero(offload_param="auto", offload_optimizer=["nvme"]))


# Precision, as DeepSpeed reads it.


@pytest.mark.parametrize("enabled", [True, 1, "true", "True", "on", "1"])
@pytest.mark.parametrize("section", ["bf16", "bfloat16"])
def test_spellings_of_true_that_deepspeed_takes(section, enabled):
    from deepspeed.runtime.precision_config import get_bfloat16_config

    written = {**STAGE3, section: {"enabled": enabled}}
    assert get_bfloat16_config(written).enabled is True
    config = load_ds_config(written)
    assert config["bf16"] == {"enabled": True}
    assert "bfloat16" not in config
    assert engine_dtype(config, "float32") == "bfloat16"
    assert resolve_auto(config, "bfloat16", 1, 1)["bf16"]["enabled"] is True


@pytest.mark.parametrize("enabled", [False, 0, "false", "off"])
def test_spellings_of_false(enabled):
    assert engine_dtype(load_ds_config({**STAGE3, "fp16": {"enabled": enabled}}), "float16") == "float32"


@pytest.mark.parametrize("section", [True, "auto", [], {"enabled": "perhaps"}, {"enabled": None}, {"enabled": 2}])
def test_precision_that_is_not_understood(section):
    with raises("ds_config.bad_precision_section", "bf16", '"bf16": {"enabled": true}'):
        load_ds_config({**STAGE3, "bf16": section})


def test_both_precisions():
    with raises("ds_config.bf16_and_fp16"):
        load_ds_config({**STAGE3, "bf16": {"enabled": 1}, "fp16": {"enabled": True}})


# Mistakes in a config, found before anything is built.


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"train_batch_size": "4"}, "bad_batch_size", "train_batch_size is '4'"),
        ({"train_micro_batch_size_per_gpu": 0}, "bad_batch_size", "train_micro_batch_size_per_gpu is 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "2"}}, "bad_hpz_size", "'2'"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "refused_by_deepspeed", "offload_param"),
        ({"zero_optimization": {"stage": 3, "no_such_key": 1}}, "refused_by_deepspeed", "no_such_key"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}, "refused_by_deepspeed", "reduce_bucket_size"),
    ],
)
def test_mistakes_are_config_errors(changes, code, said, tmp_path):
    from tests import models
    from zero_sft import load_model

    folder = models.save_tiny("llama", tmp_path / "llama")
    with raises(f"ds_config.{code}", said):
        load_model(str(folder), ds_config={**STAGE3, **changes})


def test_absent_batch_sizes_may_be_null():
    config = resolve_auto({**STAGE3, "train_batch_size": None, "train_micro_batch_size_per_gpu": None}, "float32", 1, 1)
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert "train_batch_size" not in config
