"""Tests of unusable RoPE parameters, from the argument or config.json: one error before anything is built."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.errors import raises
from tests.models import tiny_config
from zero_sft.rope import with_context

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}


def scaled(rope: dict, name: str = "llama"):
    """Return a tiny config with these RoPE parameters, as config.json may hold them; transformers only warns about them."""
    config = tiny_config(name, hidden_size=24)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    return config


WRONG = {
    "text": ({"rope_type": "linear", "factor": "2.0"}, ("'factor'", "'2.0'", "Write it without quotes: 2.0")),
    "other text": ({"rope_type": "linear", "factor": "two"}, ("'factor'", "'two'")),
    "unknown type": ({"rope_type": "lineer", "factor": 2.0}, ("'lineer'", *ROPE_INIT_FUNCTIONS, "default")),
    "no factor": ({"rope_type": "linear"}, ("needs a 'factor'",)),
    "null": ({"rope_type": "dynamic", "factor": None}, ("needs a 'factor'",)),
    "zero": ({"rope_type": "linear", "factor": 0}, ("above 0", "got 0")),
    "negative": ({"rope_type": "linear", "factor": -2.0}, ("above 0", "-2.0")),
    "nan": ({"rope_type": "linear", "factor": float("nan")}, ("above 0", "nan")),
    "boolean": ({"rope_type": "linear", "factor": True}, ("above 0", "True")),
    "theta": ({"rope_type": "default", "rope_theta": "1e6"}, ("'rope_theta'", "Write it without quotes")),
    "original": ({**YARN, "factor": 2.0, "original_max_position_embeddings": "64"}, ("original_max_position_embeddings",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_in_the_models_own_config(fault):
    rope, parts = WRONG[fault]
    with raises("rope.bad_parameters_in_config") as caught:
        with_context(scaled(rope), model_max_length=128)
    for part in ("config.json", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("fault", sorted(WRONG.keys() - {"unknown type"}))
def test_in_the_argument(fault):
    rope, parts = WRONG[fault]
    with raises("rope.bad_parameters") as caught:
        with_context(scaled({"rope_type": "default"}), rope_parameters=rope)
    for part in ("rope_parameters", *parts):
        assert part in str(caught.value)


def test_an_unknown_type_in_the_argument_is_answered_with_the_known_ones():
    with raises("rope.bad_parameters") as caught:
        with_context(scaled({"rope_type": "default"}), rope_parameters={"rope_type": "lineer", "factor": 2.0})
    for name in ROPE_INIT_FUNCTIONS:
        assert name in str(caught.value)


def test_one_bad_layer_type_among_several():
    config = tiny_config("llama", hidden_size=24)
    config.rope_parameters = {
        "full_attention": {"rope_type": "linear", "factor": "8.0", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with raises("rope.bad_parameters_in_config", "full_attention", "'8.0'"):
        with_context(config, model_max_length=64)


@pytest.mark.parametrize(
    ("rope", "wanted", "factor"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 256, "4"),
        ({"rope_type": "dynamic", "factor": 2.0}, 200, "3.13"),
        ({**YARN, "factor": 2.0}, 256, "4"),
    ],
)
def test_a_factor_that_is_too_small_for_the_length(rope, wanted, factor):
    config = scaled({"rope_type": "default"})
    with raises("rope.does_not_reach_length", f"at least {factor},", "128 tokens") as caught:
        with_context(config, model_max_length=wanted, rope_parameters=rope)
    assert f"--model_max_length {wanted}" in str(caught.value)
    enough = with_context(config, model_max_length=wanted, rope_parameters={**rope, "factor": float(factor)})
    model = AutoModelForCausalLM.from_config(enough)
    with torch.no_grad():
        assert model(torch.zeros(1, wanted, dtype=torch.long)).logits.isfinite().all()
    assert with_context(config, rope_parameters=rope).rope_parameters["factor"] == 2.0  # without a length


def test_another_theta_alone_is_the_users_own_choice():
    """A larger rope_theta extends the context without a factor."""
    changed = with_context(
        scaled({"rope_type": "default"}), model_max_length=512, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    assert changed.rope_parameters["rope_theta"] == 1e6
