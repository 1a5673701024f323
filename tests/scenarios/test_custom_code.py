"""Tests of models with custom code, which are loaded if the code is trusted and refused otherwise."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from testing.runner import run_ranks
from tests import models
from tests.data import tiny
from tests.errors import error_codes, raises

CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=30, num_layers=2, vocab_size=131, **kwargs):
        self.hidden_size, self.num_layers, self.vocab_size = hidden_size, num_layers, vocab_size
        self.num_hidden_layers, self.max_position_embeddings, self.num_attention_heads = num_layers, 64, 1
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_own import OwnConfig
from .parts import Block

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_layers)])
        self.register_buffer("scale", torch.linspace(0.5, 2, config.hidden_size), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=0.02)

    def forward(self, input_ids, **kwargs):
        hidden = self.embedding(input_ids) * self.scale
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=hidden)

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = OwnModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    _init_weights = OwnModel._init_weights

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.body(input_ids).last_hidden_state))
"""

PARTS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 53), nn.Linear(53, width)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).relu())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint with three files of code: the config, the model and one of its modules."""
    # transformers adds its cache of code to sys.path, which the ranks of later tests would inherit.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    sources = {"configuration_own": CONFIGURATION, "modeling_own": MODELING, "parts": PARTS}
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own", "auto_map": auto_map, "architectures": ["OwnForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    own = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(own, trust_remote_code=True)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    config_now = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config_now, **config}))
    return folder


@pytest.mark.world_size(1, 3)
def test_trusted_code_is_run(folder):
    from zero_sft import load_model

    reference = models.plain(folder, torch.bfloat16, trust_remote_code=True)
    # No _init_weights recomputes it, so plain loading leaves uninitialised memory in it.
    reference.body.scale = torch.linspace(0.5, 2, 30, dtype=torch.bfloat16)
    model = load_model(str(folder), ds_config=models.zero3(), trust_remote_code=True)
    models.assert_equal(model, reference)
    assert model.load_report.missing_keys == []
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.world_size(2)
def test_without_trust_there_is_one_refusal_and_nothing_is_run(folder):
    from zero_sft import load_model

    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('this was run')")
    with raises("config.unknown_model_type", "trust_remote_code"):
        load_model(str(folder), ds_config=models.zero3())


@pytest.mark.world_size(1)
@pytest.mark.slow
def test_an_export_brings_the_code_along(folder, tmp_path):
    """Plain transformers loads the export with the code in the export's folder."""
    from zero_sft import load_model, save_pretrained

    save_pretrained(load_model(str(folder), ds_config=models.zero3(), trust_remote_code=True), tmp_path / "out")
    shutil.rmtree(folder)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M; "
        "print(type(M.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.split() == ["OwnForCausalLM"], done.stderr


def job(folder, out, options, code=None):
    """One rank's part of a job with the model in `folder/own`; `code`: of the error with which it ends."""
    import transformers

    from zero_sft import train

    sys.path = [path for path in sys.path if path != str(folder / "modules")]  # that of the test's own process
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / f"modules-{os.environ['RANK']}")
    given = {
        "model_name_or_path": folder / "own", "data_path": folder / "data.json", "output_dir": folder / out,
        "trust_remote_code": True, "model_max_length": 64, "per_device_train_batch_size": 2, "max_steps": 4, "packing": False,
        "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "activation_checkpointing": False, **options,
    }  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = train.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    assert status == (code is not None), said.getvalue()
    if code and os.environ["RANK"] == "0":
        assert error_codes(said.getvalue()) == [code], said.getvalue()


@pytest.fixture
def trainable(folder):
    """The model with a tokenizer, next to conversations. Returns the folder of both."""
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    own = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    own.vocab_size = len(tokenizer)
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(own, trust_remote_code=True).to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("model-0*"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    tokenizer.save_pretrained(folder)
    talks = [[{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{i} " * 5}] for i in range(16)]
    (folder.parent / "data.json").write_text(json.dumps([{"conversations": talk} for talk in talks]))
    return folder.parent


@pytest.mark.slow
def test_a_run_and_its_continuation(trainable):
    """The checkpoint brings its code along, so the model's own folder is not needed for the weights."""
    run_ranks(2, job, {"folder": trainable, "out": "whole", "options": {}}, 300)
    resumed = {"resume_from_checkpoint": trainable / "whole" / "checkpoint-2"}
    run_ranks(2, job, {"folder": trainable, "out": "again", "options": resumed}, 300)
    whole, again = (load_file(trainable / out / "model.safetensors") for out in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    before = load_file(trainable / "own" / "model.safetensors")
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


@pytest.mark.slow
def test_code_that_can_not_be_trained(trainable):
    """One error instead of a traceback of TRL's."""
    options = {"activation_checkpointing": True}
    run_ranks(
        2, job, {"folder": trainable, "out": "x", "options": options, "code": "arguments.no_activation_checkpointing"}, 200
    )
    path = trainable / "own" / "modeling_own.py"
    path.write_text(path.read_text().replace("def get_output_embeddings", "def other"))
    run_ranks(2, job, {"folder": trainable, "out": "y", "options": {}, "code": "config.no_output_embeddings"}, 200)
