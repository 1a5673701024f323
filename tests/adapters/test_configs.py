"""Configs of adapters that this job does not train on."""

import json

import pytest
from peft import LoraConfig

from tests import models
from tests.errors import raises
from zero_sft.adapters.attach import adapted_on_meta, read_lora_config

GIVEN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("change", [{"r": "4"}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": "8"}])
def test_numbers_that_are_none(tmp_path, change):
    (tmp_path / "adapter_config.json").write_text(json.dumps(GIVEN | change))
    with raises("adapter.config_unusable", str(tmp_path), repr(next(iter(change.values())))):
        read_lora_config(tmp_path)


def test_what_can_not_be_added(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    def model(kind):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.save_tiny(kind, tmp_path / kind)))

    with raises("adapter.repeats_layers", "layer_replication"):
        adapted_on_meta(model("llama"), LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)]))
    with raises("adapter.no_such_modules", "no default modules", "q_proj"):
        adapted_on_meta(model("mixtral"), LoraConfig(r=4))
