"""Packed samples stay apart on a device, with each attention that the job packs for and that is installed.

Two questions. Does a sample's answer change with the other samples of its row? Their tokens are replaced, shapes stay, kernels
are deterministic forward, so not one bit may. And is it what the sample gives alone? To the rounding of the dtype.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from tests import architectures, models
from tests.gpu.devices import Cases, device, on_cpu
from zero_sft.data.packing import ATTENTIONS

pytestmark = pytest.mark.gpu

LENGTHS = ((90, 140, 60), (70, 110))
TYPES = ("llama", "qwen3", "mistral", "gemma", "mixtral")
COMPILED_TYPES = ("llama", "mistral")
"""Those of them for an attention that is compiled for each mask, some ten seconds each."""
AVAILABLE = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flex_attention": is_torch_flex_attn_available,
}


def build(kind, attention, dtype):
    """A model with heads of 32 and windows shorter than a row, as flash and flex take them."""
    torch.manual_seed(2)
    changes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 256,
               "max_position_embeddings": 512}  # fmt: skip
    if kind == "mistral":
        changes["sliding_window"] = 48
    config = models.tiny_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    architectures.randomise(model)
    for param in model.parameters():
        if param.is_floating_point():
            param.data.mul_(0.3)
    return model.to(device()).train()


def rows(first_seed, others_seed):
    """Rows of samples' tokens; the first sample of each row comes from the one seed, all others from the other."""

    def tokens(n, seed):
        return torch.randint(5, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist()

    return [[tokens(n, 100 * number + place + (others_seed if place else first_seed)) for place, n in enumerate(lengths)]
            for number, lengths in enumerate(LENGTHS)]  # fmt: skip


@torch.no_grad()
def logits_of(model, packed, attention):
    """Each sample's logits, row by row, of a batch that the job's collator makes for that attention."""
    from zero_sft.data.collator import Collator

    flat = [[token for sample in row for token in sample] for row in packed]
    samples = [{"input_ids": ids, "labels": ids, "seq_lengths": list(map(len, row))}
               for ids, row in zip(flat, packed, strict=True)]  # fmt: skip
    batch = Collator(pad_token_id=0, flat="flash" in attention)(samples)
    batch = {key: value.to(device()) for key, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    if "flash" in attention:
        logits = list(torch.split(logits[0], [len(ids) for ids in flat]))
    return [list(torch.split(row[: sum(map(len, of))], list(map(len, of)))) for row, of in zip(logits, packed, strict=True)]


@torch.no_grad()
def alone(model, sample):
    """A sample's logits by itself."""
    return model(input_ids=torch.tensor([sample], device=device()), use_cache=False).logits[0]


@pytest.fixture
def installed(attention):
    if not AVAILABLE.get(attention, lambda: True)():
        pytest.skip(f"{attention} is not installed")
    if attention == "flex_attention" and on_cpu():
        pytest.skip("flex_attention has no backward pass on a CPU")


@pytest.mark.world_size(1, timeout_s=240)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_samples_of_a_row_do_not_see_each_other(installed, attention):
    cases = Cases()
    dtype, tolerance = (torch.bfloat16, 0.05) if "flash" in attention else (torch.float32, 1e-2)
    for kind in COMPILED_TYPES if attention == "flex_attention" else TYPES:
        with cases.case(kind):
            model = build(kind, attention, dtype)
            packed, changed = rows(0, 1000), rows(0, 2000)
            one, other = (logits_of(model, each, attention) for each in (packed, changed))
            for number, row in enumerate(packed):
                # A router may send another sample's tokens along, which changes shapes inside the experts, and rounding.
                same = torch.allclose if kind == "mixtral" else torch.equal
                assert same(one[number][0].float(), other[number][0].float()), "the first sample sees a later one"
                for place, sample in enumerate(row):
                    expected = alone(model, sample).float()
                    worst = (one[number][place].float() - expected).abs().max() / expected.abs().max()
                    assert worst < tolerance, (number, place, float(worst))
            last = rows(3000, 1000)  # the first sample is replaced, the later ones stay
            for number, row in enumerate(logits_of(model, last, attention)):
                for place in range(1, len(row)):
                    same = torch.allclose if kind == "mixtral" else torch.equal
                    assert same(row[place].float(), one[number][place].float()), "a later sample sees the first one"
    cases.require_all()


@pytest.mark.world_size(1)
@pytest.mark.parametrize("attention", ["sdpa"])
def test_the_check_sees_a_leak(installed, attention):
    """Without the borders between samples a later one sees the first."""
    model = build("llama", attention, torch.float32)
    forward = model.forward
    model.forward = lambda *, position_ids=None, **rest: forward(**rest)
    one, other = (logits_of(model, rows(seed, 1000), attention) for seed in (0, 3000))
    assert not torch.equal(one[0][1], other[0][1])


@pytest.mark.world_size(1, timeout_s=240)
@pytest.mark.parametrize("attention", [each for each in ATTENTIONS if each != "eager"])
def test_gradients_of_packed_rows_are_those_of_their_samples(installed, attention):
    """The backward pass of each attention's own kernels."""
    from zero_sft.data.collator import Collator

    dtype, tolerance = (torch.bfloat16, 0.05) if "flash" in attention else (torch.float32, 1e-2)
    model = build("llama", attention, dtype)
    packed = rows(0, 1000)
    flat = [[token for sample in row for token in sample] for row in packed]
    together = [{"input_ids": ids, "labels": ids, "seq_lengths": list(map(len, row))}
                for ids, row in zip(flat, packed, strict=True)]  # fmt: skip
    for row in together:  # the first token of a sample is not predicted from the one before it
        starts = [sum(row["seq_lengths"][:n]) for n in range(len(row["seq_lengths"]))]
        row["labels"] = [-100 if n in starts else token for n, token in enumerate(row["labels"])]
    batch = Collator(pad_token_id=0, flat="flash" in attention)(together)
    batch.pop("row_lengths", None)
    gradients = []
    for kind in ("packed", "alone"):
        model.zero_grad()
        if kind == "packed":
            logits = model(**{k: v.to(device()) for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            summed(logits, batch["labels"].to(device())).backward()
        else:
            for sample in (sample for row in packed for sample in row):
                ids = torch.tensor([sample], device=device())
                summed(model(input_ids=ids, use_cache=False).logits, ids).backward()
        gradients.append(torch.cat([param.grad.float().flatten() for param in model.parameters() if param.grad is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert difference < tolerance, float(difference)


def summed(logits, labels):
    """The summed loss of the next tokens; -100 is left out."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
