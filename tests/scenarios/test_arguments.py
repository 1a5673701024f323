"""Arguments of public functions: wrong types are one error, and ranks with different arguments never wait for each other."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from tests import models
from tests.errors import raises

DS = models.zero3(train_micro_batch_size_per_gpu=1)
FP32 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


@pytest.fixture
def llama(tmp_path):
    return models.save_tiny("llama", tmp_path / "llama")


@pytest.mark.world_size(1)
def test_wrong_types_of_a_load(llama):
    from transformers import LlamaPreTrainedModel, PreTrainedModel

    from zero_sft import load_model, load_pretrained, load_tokenizer, prepare_config

    for name in (None, 5, b"org/model", [str(llama)], f"{llama}\0"):
        for function, arguments in (
            (load_model, {"ds_config": DS}),
            (load_pretrained, {"ds_config": DS}),
            (load_tokenizer, {"model_max_length": 16}),
            (prepare_config, {}),
        ):
            with raises("arguments.wrong_value", "model_name_or_path must be text or a path", repr(name)):
                function(name, **arguments)
    for arguments, expected in [
        ({"config": {}}, "config must be a config object"),
        ({"config": str(llama)}, "config must be a config object"),
        ({"while_reading": 5}, "while_reading must be a function"),
        ({"model_class": PreTrainedModel}, "PreTrainedModel"),
        ({"model_class": LlamaPreTrainedModel}, "LlamaPreTrainedModel"),
        ({"model_class": 5}, "model_class must be"),
    ]:
        with raises("arguments.wrong_value", expected):
            load_model(str(llama), ds_config=DS, **arguments)


@pytest.mark.world_size(1)
def test_a_path_object_is_taken(llama):
    from zero_sft import load_model, prepare_config

    assert prepare_config(Path(llama)).name_or_path == str(llama)
    assert load_model(Path(llama), ds_config=DS).name_or_path == str(llama)


@pytest.mark.world_size(1)
def test_wrong_types_of_an_export(llama, tmp_path):
    from zero_sft import load_model, save_pretrained

    model = load_model(str(llama), ds_config=DS)
    out = tmp_path / "out"
    for path in (None, 3, os.fsencode(out), f"{out}\0"):
        with raises("arguments.wrong_value", "path must be text or a path", repr(path)):
            save_pretrained(model, path)
    for size in ("5GB", 0, -5, True, 5.5):
        with raises("arguments.wrong_value", "max_file_bytes must be a whole number of bytes, at least 1", repr(size)):
            save_pretrained(model, out, max_file_bytes=size)
    with raises("arguments.wrong_value", "tokenizer must be a tokenizer", "'x'"):
        save_pretrained(model, out, tokenizer="x")
    assert not out.exists()


@pytest.mark.world_size(2)
def test_one_rank_with_other_arguments_of_a_load(llama):
    """`strict` and `verify` decide how often the ranks exchange; the other ranks would wait for ever."""
    from transformers import LlamaForCausalLM

    from zero_sft import load_model, prepare_config

    second = os.environ["RANK"] == "1"
    config, other = prepare_config(str(llama)), prepare_config(str(llama))
    other.rms_norm_eps = 0.25
    for arguments, code, values in [
        ({"buffer_mib": 0}, "arguments.wrong_value", ("buffer_mib", "rank 1 of 2")),
        ({"nosuch": 1}, "arguments.unknown", ("nosuch",)),
        ({"model_name_or_path": None}, "arguments.wrong_value", ("model_name_or_path",)),
        ({"config": {}}, "arguments.wrong_value", ("config",)),
        ({"while_reading": 5}, "arguments.wrong_value", ("while_reading",)),
        ({"strict": True}, "cluster.ranks_disagree", ("strict: false on rank 0; true on rank 1",)),
        ({"verify": True}, "cluster.ranks_disagree", ("verify: false on rank 0; true on rank 1",)),
        ({"loader": "stock"}, "cluster.ranks_disagree", ('"sharded" on rank 0; "stock" on rank 1',)),
        ({"dtype": "float32"}, "cluster.ranks_disagree", ('dtype: "auto" on rank 0; "float32" on rank 1',)),
        ({"trust_remote_code": True}, "cluster.ranks_disagree", ("trust_remote_code",)),
        ({"model_class": LlamaForCausalLM}, "cluster.ranks_disagree", ('model_class: "AutoModelForCausalLM" on rank 0',)),
        ({"config": config}, "cluster.ranks_disagree", ('config: "None" on rank 0; "LlamaConfig" on rank 1',)),
        ({"ds_config": FP32}, "cluster.ranks_disagree", ("ds_config.bf16.enabled: true on rank 0; (absent) on rank 1",)),
        ({"ds_config": {}}, "ds_config.not_stage_3", ("rank 1 of 2",)),
    ]:  # fmt: skip
        with raises(code, *values):
            load_model(**{"model_name_or_path": str(llama), "ds_config": DS, **(arguments if second else {})})
    with raises("cluster.ranks_disagree", "config.rms_norm_eps: 1e-06 on rank 0; 0.25 on rank 1"):
        load_model(str(llama), ds_config=DS, config=other if second else config)


@pytest.mark.world_size(2)
def test_what_may_differ_between_ranks(llama, tmp_path):
    """The path of a node's copy, memory, and what a rank reports."""
    import shutil

    from zero_sft import load_model

    second = os.environ["RANK"] == "1"
    copy = shutil.copytree(llama, tmp_path / f"node-{os.environ['RANK']}")
    reference = models.plain(llama, torch.bfloat16)
    ds = {**DS, "steps_per_print": 1 if second else 1000, "tensorboard": {"enabled": False, "job_name": os.environ["RANK"]}}
    model = load_model(str(copy), ds_config=ds, buffer_mib=16 if second else 64)
    models.assert_equal(model, reference)


@pytest.mark.world_size(2)
def test_one_rank_with_other_arguments_of_an_export(llama, tmp_path):
    from zero_sft import load_model, save_pretrained

    second = os.environ["RANK"] == "1"
    model = load_model(str(llama), ds_config=DS)
    for name, value in [("max_file_bytes", "5"), ("path", None), ("tokenizer", "x")]:
        with raises("arguments.wrong_value", name, "rank 1 of 2"):
            save_pretrained(model, **{"path": tmp_path / "out", **({name: value} if second else {})})
    assert not (tmp_path / "out").exists()


@pytest.mark.world_size(2)
def test_one_rank_with_other_arguments_of_config_and_tokenizer(llama):
    from zero_sft import load_tokenizer, prepare_config

    second = os.environ["RANK"] == "1"
    for code, arguments in [
        ("cluster.ranks_disagree", {"trust_remote_code": True}),
        ("arguments.unknown", {"nosuch": 1}),
        ("arguments.wrong_value", {"revision": 5}),
    ]:
        name = next(iter(arguments))
        with raises(code, name):
            prepare_config(str(llama), **(arguments if second else {}))
        with raises(code, name):
            load_tokenizer(str(llama), model_max_length=16, **(arguments if second else {}))


@contextlib.contextmanager
def default_device(how: str):
    if how == "context":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_device("meta")
        try:
            yield
        finally:
            torch.set_default_device(None)


@pytest.mark.world_size(1, 2)
@pytest.mark.parametrize("how", ["context", "set"])
def test_a_default_device_of_the_caller_does_not_matter(llama, tmp_path, how):
    """Also where the ranks connect under it for the first time."""
    from zero_sft import load_model, save_pretrained

    reference = models.plain(llama, torch.bfloat16)
    with default_device(how):
        model = load_model(str(llama), ds_config=DS, verify=True)
        save_pretrained(model, tmp_path / "out")
        assert torch.empty(1).is_meta, "it is the caller's again"
    assert model.load_report.verified
    models.assert_equal(model, reference)
    del model
    again, expected = models.plain(tmp_path / "out", torch.bfloat16).state_dict(), reference.state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.world_size(2)
def test_the_stock_loader_under_a_default_device(llama):
    from zero_sft import load_model

    reference = models.plain(llama, torch.bfloat16)
    with default_device("context"):
        model = load_model(str(llama), ds_config=DS, loader="stock")
    models.assert_equal(model, reference)
