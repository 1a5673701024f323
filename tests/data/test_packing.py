"""`zero_sft.data.packing`: packed samples are computed as if each was alone; where that is not known, none are packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import architectures, isolation
from tests.attentions import FLASH, give, kernels_of
from tests.data.test_dataset import written
from tests.data.tiny import CHATML, byte_tokenizer, prepare
from tests.errors import raises
from tests.slow import slow_except
from zero_sft.data.collator import Collator
from zero_sft.data.packing import PACKABLE_MODEL_TYPES, pack, packed_line, position_ids, resolve_packing
from zero_sft.data.tokenize import IGNORE_INDEX

NAMED = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "mixtral", "gpt_neox", "phi", "phi3", "gpt2")
LEAKY = ("opt", "bloom", "falcon", "mamba")


@pytest.mark.parametrize("model_type", slow_except(NAMED, sorted(PACKABLE_MODEL_TYPES | set(NAMED))))
def test_they_keep_packed_samples_apart(model_type):
    """With each attention that it is packed for; flash and flex without their kernels."""
    assert model_type in PACKABLE_MODEL_TYPES
    config = architectures.tiny_config(model_type)
    packed = [each for each in isolation.ATTENTIONS if resolve_packing(None, config, attention=each, lazy=False).enabled]
    assert {"sdpa", "eager"} <= set(packed)
    assert isolation.verdict(model_type, packed) == ""


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "persimmon"])
def test_an_attention_that_gets_no_position_ids_is_not_packed_for(model_type):
    config = architectures.tiny_config(model_type)
    assert isolation.verdict(model_type, ["flash_attention_2"]).startswith("flash_attention_2: ")
    for attention in ("flash_attention_2", "flash_attention_3"):
        assert not resolve_packing(None, config, attention=attention, lazy=False).enabled
    with raises("data.packing_impossible", "flash_attention_2", model_type):
        resolve_packing(True, config, attention="flash_attention_2", lazy=False)


@pytest.mark.parametrize("model_type", LEAKY)
def test_what_leaks_is_not_packed(model_type):
    config = architectures.tiny_config(model_type)
    assert not resolve_packing(None, config, attention=None, lazy=False).enabled
    with raises("data.packing_impossible", model_type):
        resolve_packing(True, config, attention=None, lazy=False)


def test_the_check_sees_a_leak():
    """Without the borders between samples the same model leaks."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(architectures.tiny_config("llama"), dtype=torch.float32).eval()
    architectures.randomise(model)
    forward = model.forward
    assert isolation.leak(model) < isolation.TOLERANCE
    model.forward = lambda *, position_ids=None, **rest: forward(**rest)
    assert isolation.leak(model) > 0.01


def test_when_samples_are_packed():
    llama = architectures.tiny_config("llama")
    assert resolve_packing(None, llama, attention=None, lazy=False).enabled
    assert resolve_packing(True, llama, attention="flash_attention_2", lazy=False).enabled
    assert not resolve_packing(False, llama, attention=None, lazy=False).enabled
    assert "lazy_preprocess" in resolve_packing(None, llama, attention=None, lazy=True).reason
    assert "attention paged" in resolve_packing(None, llama, attention="paged", lazy=False).reason
    with raises("data.packing_impossible", "lazy_preprocess"):
        resolve_packing(True, llama, attention=None, lazy=True)


@pytest.fixture
def samples(tmp_path):
    """Samples of many lengths."""
    path = written(tmp_path, *[("a" * n, "b" * (1 + 17 * n % 60)) for n in range(30)])
    return prepare(path, byte_tokenizer(CHATML), model_max_length=300).samples


def test_every_sample_is_whole_in_one_row(samples):
    packed = pack(samples, 300)
    assert max(map(len, packed["input_ids"])) <= 300
    assert len(packed) < len(samples)
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(found) == sorted(zip(samples["input_ids"], samples["labels"], strict=True))
    tokens = sum(samples["length"])
    assert f"{tokens / len(packed) / 300:.1%} full" in packed_line(30, packed, 300)


def test_positions_begin_anew():
    assert position_ids([3, 2], 7) == [0, 1, 2, 0, 1, 0, 1]
    assert position_ids([4], 4) == [0, 1, 2, 3]


ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX, 2, IGNORE_INDEX, 4], "seq_lengths": [2, 2]},
    {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7], "seq_lengths": [3]},
]


def test_a_batch_of_rows():
    batch = Collator(pad_token_id=0, multiple_of=3)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 0, 0], [5, 6, 7, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, 2, IGNORE_INDEX, 4, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, 6, 7, *[IGNORE_INDEX] * 3],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch.keys() == {"input_ids", "labels", "position_ids"}


def test_a_flat_batch():
    batch = Collator(pad_token_id=0, flat=True)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1, 2]]
    assert batch["row_lengths"].tolist() == [4, 3]
    assert Collator(pad_token_id=0, flat=True)([{"input_ids": [1], "labels": [1]}] * 2)["input_ids"].shape == (2, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma", "gpt2"])
def test_the_loss_of_a_packed_batch_is_that_of_its_samples(samples, model_type, attention):
    torch.manual_seed(1)
    config = architectures.tiny_config(model_type)
    config.vocab_size = 300
    config.max_position_embeddings = 512
    if model_type == "gpt2":
        config.n_positions = 512
    built = "sdpa" if attention == FLASH else attention
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=built).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses, gradients = [], []
    for rows, used in ((samples, built), (pack(samples, 300), attention)):
        model.zero_grad()
        assert give(model, used)
        batch = Collator(pad_token_id=0, multiple_of=8, flat=used == FLASH)(list(rows))
        batch.pop("row_lengths", None)
        with kernels_of(used):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
