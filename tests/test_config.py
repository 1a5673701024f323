"""Tests of the config: the length of a model's context, its scaling, and the same config on all ranks."""

import importlib
import inspect
import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.errors import raises
from zero_sft.cluster.world import World
from zero_sft.config import load_config, prepare_config
from zero_sft.errors import ConfigError
from zero_sft.hub.options import HubOptions
from zero_sft.rope import context_tokens, positions, text_config, with_context

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
PHI3 = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "hidden_size": 128,
        "num_attention_heads": 4}  # fmt: skip


def make(model_type, **settings):
    """Return a config like that of a checkpoint of this type."""
    return AutoConfig.for_model(model_type, **settings)


def rope(config):
    return text_config(config).rope_parameters


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 7e5}}),
        ("mistral", {"max_position_embeddings": 32768, "sliding_window": 4096}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gpt_neox", {"max_position_embeddings": 2048}),
        ("falcon", {"alibi": False}),
        ("deepseek_v3", {}),
        ("llava", {}),
        ("mllama", {}),
    ],
)
def test_linear_scaling_begins_beyond_the_context(model_type, settings):
    config = make(model_type, **settings)
    count = text_config(config).max_position_embeddings
    before = rope(config)
    assert rope(with_context(config, model_max_length=count)) == before
    for wanted, factor in [(count + 1, 2.0), (2 * count, 2.0), (2 * count + 1, 3.0), (5 * count - 1, 5.0)]:
        assert rope(with_context(config, model_max_length=wanted)) == {
            **before,
            "rope_type": "linear",
            "factor": factor,
        }
    assert rope(config) == before, "the config that was passed in is left as it is"


def test_vicuna_16k_keeps_its_scaling_within_its_context():
    """4096 positions with the linear factor 4.0 make 16384 tokens. The config uses the old keys, as in that checkpoint."""
    vicuna = make("llama", max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=1e4)
    for wanted in (2048, 8192, 16384):
        assert rope(with_context(vicuna, model_max_length=wanted))["factor"] == 4.0
    beyond = rope(with_context(vicuna, model_max_length=16385))
    assert (beyond["rope_type"], beyond["factor"], beyond["rope_theta"]) == ("linear", 5.0, 1e4)


@pytest.mark.parametrize(
    ("kind", "count", "tokens"),
    [
        ({}, 4096, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 4096, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 32768, 65536),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, 131072, 131072),
        (
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            163840,
            163840,
        ),  # DeepSeek-V3
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),  # Qwen2.5
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, 131072),  # Qwen3
        (LLAMA3, 131072, 131072),  # Llama 3.1
        ({**LLAMA3, "factor": 32.0}, 131072, 131072),  # Llama 3.2
        (LLAMA3, 8192, 65536),
        ({**LONG, "original_max_position_embeddings": 4096}, 131072, 131072),  # Phi-3-128k
        ({**LONG, "original_max_position_embeddings": 32768}, 32768, 32768),  # MiniCPM4
    ],
)
def test_the_context_that_a_model_really_has(kind, count, tokens):
    assert context_tokens(kind, count) == tokens


SCALED = {
    "llama3": ("llama", {"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
    "yarn": ("deepseek_v3", {"max_position_embeddings": 163840, "rope_parameters": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0}}, 163840),
    "longrope": ("phi3", {**PHI3, "rope_parameters": LONG}, 131072),
    "dynamic": ("llama", {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
                4096),
    "proportional": ("gemma4_text", {}, 131072),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_other_kinds_of_scaling_are_kept_within_their_context_and_never_replaced_beyond(kind):
    model_type, settings, context = SCALED[kind]
    config = make(model_type, **settings)
    before = rope(config)
    assert rope(with_context(config, model_max_length=context)) == before
    with raises("rope.other_scaling_in_place", f"{context} tokens", kind, "rope_parameters"):
        with_context(config, model_max_length=context + 1)


def test_given_rope_parameters_win_and_keep_rope_theta():
    config = make("llama", max_position_embeddings=131072, rope_parameters=LLAMA3)
    given = {"rope_type": "yarn", "factor": 32}
    new = rope(with_context(config, model_max_length=2**18, rope_parameters=given))
    assert new == {**given, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    assert rope(with_context(config, rope_parameters={"rope_type": "llama3", "factor": 16.0})) == {
        **LLAMA3,
        "factor": 16.0,
    }
    assert (
        rope(with_context(config, rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1.0}))["rope_theta"] == 1.0
    )
    phi3 = with_context(make("phi3", **PHI3, rope_parameters=LONG), rope_parameters={
        **LONG, "original_max_position_embeddings": 8192})  # fmt: skip
    assert rope(phi3)["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        "linear",
        {"factor": 2.0},
        {"rope_type": "ntk", "factor": 2.0},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "linear"},
        {"rope_type": "llama3", "factor": 8.0},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_unusable_rope_parameters(given):
    with raises("rope.bad_parameters"):
        with_context(make("llama"), rope_parameters=given)


def test_one_rope_by_layer_type_scales_the_global_layers():
    for model_type in ("gemma3_text", "gemma3", "modernbert-decoder", "olmo3"):
        config = make(model_type)
        before, count = rope(config), text_config(config).max_position_embeddings
        after = rope(with_context(config, model_max_length=3 * count))
        assert after["sliding_attention"] == before["sliding_attention"]
        assert after["full_attention"] == {**before["full_attention"], "rope_type": "linear", "factor": 3.0}
    given = {"rope_type": "linear", "factor": 8.0}
    assert rope(with_context(config, rope_parameters=given))["full_attention"]["factor"] == 8.0
    new = rope(with_context(config, rope_parameters={"sliding_attention": given}))
    assert new["sliding_attention"]["factor"] == 8.0
    assert new["full_attention"] == before["full_attention"]


def test_deepseek_v4_scales_the_layers_that_see_everything():
    after = rope(with_context(make("deepseek_v4"), model_max_length=2**21))
    assert (after["main"]["rope_type"], after["compress"]["factor"]) == ("default", 2.0)


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neo", "biogpt", "gpt_bigcode", "gptj", "codegen", "xglm"])
def test_position_tables_end_where_they_end(model_type):
    config = make(model_type)
    count = config.max_position_embeddings
    with_context(config, model_max_length=count)
    with raises("rope.position_table_too_short", f" {count} ", f"--model_max_length {count + 1}", f" {count}."):
        with_context(config, model_max_length=count + 1)
    with raises("rope.model_without_rope"):
        with_context(config, rope_parameters={"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("bloom", {"seq_length": 2048}), ("falcon", {"alibi": True}), ("mamba", {}), ("mamba2", {}), ("jamba", {}),
     ("rwkv", {}), ("nemotron_h", {}), ("granitemoehybrid", {}), ("zamba2", {})],
)  # fmt: skip
def test_positions_without_end_need_nothing(model_type, settings):
    config = make(model_type, **settings)
    plain, long = with_context(config).to_dict(), with_context(config, model_max_length=10**6).to_dict()
    assert plain == long


def test_mpt_builds_its_biases_for_the_wanted_length():
    """ALiBi has no maximum length, but MPT computes biases for `max_seq_len` positions and fails beyond them."""
    config = with_context(make("mpt", d_model=16, n_heads=2, n_layers=1, vocab_size=8, max_seq_len=4), model_max_length=6)
    assert config.max_seq_len == 6
    assert AutoModelForCausalLM.from_config(config)(torch.ones(1, 6, dtype=torch.long)).logits.shape == (1, 6, 8)
    assert with_context(make("mpt"), model_max_length=8).max_seq_len == 2048


def causal_types():
    """Yield every causal LM type of transformers, with its default config."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            yield model_type, make(model_type)
        except Exception:  # gemma4_assistant can't be made without its sizes
            continue


def test_every_causal_model_is_decided():
    """Every causal LM of transformers is either scaled, or refused with a ConfigError that gives the reason."""
    for _, config in causal_types():
        text = text_config(config)
        kind, count = positions(text), getattr(text, "max_position_embeddings", None)
        try:
            scaled = with_context(config, model_max_length=2 * count if count and count > 0 else 4096)
            outcome = text_config(scaled).model_type
        except ConfigError as error:
            outcome = error.code
        assert (
            (outcome == "rope.position_table_too_short") if kind == "table" else (kind == "rope" or outcome == text.model_type)
        )


def test_scaling_reaches_the_rotations():
    """If a model type builds its rotations from the config, a factor of 2 halves the frequencies."""
    reached = set()
    for model_type, config in causal_types():
        text = text_config(config)
        if positions(text) != "rope" or not getattr(text, "max_position_embeddings", None):
            continue
        try:
            scaled = text_config(with_context(config, model_max_length=2 * text.max_position_embeddings))
            module = importlib.import_module(type(text).__module__.replace(".configuration_", ".modeling_"))
        except (ConfigError, ImportError):
            continue
        for name, rotary in inspect.getmembers(module, inspect.isclass):
            if name.endswith("RotaryEmbedding") and rotary.__module__ == module.__name__ and "Vision" not in name:
                try:
                    before, after = dict(rotary(text).named_buffers()), dict(rotary(scaled).named_buffers())
                except Exception:  # rotations of other parts of the model
                    continue
                if any(torch.allclose(before[key], 2 * after[key]) for key in before if before[key].any()):
                    reached.add(model_type)
    assert len(reached) > 100
    assert reached >= {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox", "phi3", "mixtral",
                       "falcon", "deepseek_v3", "mllama"}  # fmt: skip


def test_position_tables_are_where_we_say(monkeypatch):
    """`positions` says "table" for exactly the models that hold a position table, checked on small meta models."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model_type, table in {
        "opt": 1,
        "gpt2": 1,
        "gpt_neo": 1,
        "biogpt": 1,
        "bloom": 0,
        "mpt": 0,
        "gpt_neox": 0,
    }.items():
        extra = {"attention_types": [[["global"], 1]], "num_layers": 1} if model_type == "gpt_neo" else {}
        config = make(model_type, **small, **extra)
        count = next((getattr(config, each) for each in ("max_position_embeddings", "max_seq_len") if hasattr(config, each)), 0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rows = [each.num_embeddings for each in model.modules() if isinstance(each, torch.nn.Embedding)]
        assert any(count <= each <= count + 2 for each in rows if count) == bool(table), model_type
        assert (positions(config) == "table") == bool(table), model_type


def test_use_cache_is_off_everywhere():
    for model_type in ("llama", "gemma3", "llava", "openai-gpt"):
        config = with_context(make(model_type))
        assert config.use_cache is False
        assert text_config(config).use_cache is False


@pytest.mark.parametrize("wanted", [0, -1, 2.0, "512", True])
def test_lengths_that_are_none(wanted):
    with raises("arguments.wrong_value"):
        with_context(make("llama"), model_max_length=wanted)


@pytest.mark.parametrize(
    ("text", "code", "values"),
    [
        (None, "missing", ()),
        ("{", "not_json", ()),
        ("[]", "not_an_object", ("[]",)),
        ("{}", "unknown_model_type", ("None", "pip install -U transformers")),
        ('{"model_type": ["llama"]}', "unknown_model_type", ("['llama']",)),
        ('{"model_type": "lama"}', "unknown_model_type", ("'lama'", "pip install -U transformers")),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}', "unknown_model_type",
         ("mine.Mine", "--trust_remote_code True")),
        ('{"model_type": "llama", "num_hidden_layers": "two"}', "unusable", ("llama", "num_hidden_layers")),
    ],
)  # fmt: skip
def test_unusable_files(tmp_path, text, code, values):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with raises(f"config.{code}", str(tmp_path), *values):
        load_config(tmp_path, HubOptions())


def test_a_config_that_is_a_link_to_nothing(tmp_path):
    (tmp_path / "config.json").symlink_to("../../blobs/4d7a2146")
    with raises("config.missing", f"{tmp_path}/config.json is a link to ../../blobs/4d7a2146"):
        load_config(tmp_path, HubOptions())


@pytest.fixture
def llama_folder(tmp_path):
    make("llama", vocab_size=64, hidden_size=32, max_position_embeddings=2048).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.world_size(1)
def test_one_process(llama_folder):
    config = prepare_config(str(llama_folder), model_max_length=4096)
    assert config.name_or_path == str(llama_folder)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with raises("arguments.unknown", "Did you mean revision"):
        prepare_config(str(llama_folder), revison="main")
    with raises("hub.no_such_folder"):
        prepare_config(str(llama_folder) + "/none")
    with raises("hub.no_such_folder", "is a file", f"holds it: {llama_folder}"):
        prepare_config(f"{llama_folder}/config.json")
    link = llama_folder.with_name("link")
    link.symlink_to("nowhere")
    with raises("hub.no_such_folder", f"{link} is a link to nowhere"):
        prepare_config(str(link))


@pytest.mark.world_size(3)
def test_ranks_agree(llama_folder):
    config = prepare_config(str(llama_folder), model_max_length=8192)
    assert (config.use_cache, config.rope_parameters["factor"]) == (False, 4.0)
    with raises("arguments.wrong_value"):
        prepare_config(str(llama_folder), model_max_length=0)


@pytest.mark.world_size(3)
def test_ranks_that_disagree_say_on_what(llama_folder, tmp_path):
    """This happens with node-local folders if one holds another version of the model."""
    rank = World.detect().rank
    mine = tmp_path / f"rank{rank}"
    shutil.copytree(llama_folder, mine)
    path = mine / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_parameters"]["rope_theta"] = 5e5 if rank == 2 else 1e4
    path.write_text(json.dumps(settings))
    with raises(
        "cluster.ranks_disagree", "config", "rope_parameters", "rope_theta: 10000", "0 on rank 0, 1; 500000", "0 on rank 2"
    ):
        prepare_config(str(mine))


@pytest.mark.world_size(3)
def test_a_file_that_one_rank_can_not_read_ends_all(llama_folder, tmp_path):
    rank = World.detect().rank
    mine = tmp_path / f"rank{rank}"
    shutil.copytree(llama_folder, mine)
    if rank == 1:
        (mine / "config.json").write_text('{"model_type": "llama"')
    with raises("config.not_json", "rank1/config.json", "failed: rank 1"):
        prepare_config(str(mine))


CODE = """
from transformers import PreTrainedConfig


class Mine(PreTrainedConfig):
    model_type = "mine"

    def __init__(self, rope_theta=10000.0, max_position_embeddings=128, **kwargs):
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
"""


@pytest.mark.world_size(2)
def test_custom_code_where_it_is_trusted(tmp_path):
    """The config class is written for transformers 4, with `rope_theta` and without `rope_scaling`."""
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path / "modules")
    if World.detect().is_main:
        (tmp_path / "mine.py").write_text(CODE)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    torch.distributed.barrier()
    config = prepare_config(str(tmp_path), model_max_length=200, trust_remote_code=True)
    assert type(config).__name__ == "Mine"
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
