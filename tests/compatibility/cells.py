"""Try one set-up with one method: load, call, train and save, beside plain transformers and transformers' own ZeRO-3 load."""

import copy
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests import models
from tests.compatibility.methods import Lora, Method
from tests.compatibility.setups import Setup
from zero_sft.errors import ZeroSftError
from zero_sft.transformers_internals import zero3_under

IDS = torch.arange(3, 15).view(1, -1)
STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

CALLERS = {
    "loaded values": "every parameter equals that of a load with `from_pretrained`, bit for bit",
    "three steps": "losses and trained values equal those after a stock load in the same set-up, bit for bit; with Muon those "
    "of adapters to rounding",
    "forward": "logits are those of plain transformers, before and after `deepspeed.initialize`",
    "generate": "greedy, sampled and with `synced_gpus`, likewise",
    "counts": "`num_parameters`, `get_memory_footprint`, `print`, `zero_sft.full_shape`, likewise",
    "state_dict": "an error that names `save_pretrained`; right inside `GatheredParameters`",
    "load_state_dict": "each rank takes its part; an error once an engine has started",
    "copy, move": "`copy.deepcopy` and a move to another device are errors",
    "save_pretrained": "plain transformers (or PEFT) opens what was trained",
    "resize": "`resize_token_embeddings`: rows as in plain transformers; an error once an engine has started",
}
"""What is tried, by name, with what it has to fulfil."""


def values(model: Any) -> dict[str, torch.Tensor]:
    """All parameters in full. Every rank; communicates."""
    return {name: models.gather_full(param).cpu() for name, param in model.named_parameters()}


def load(folder: Path, setup: Setup, method: Method, nvme: Path, loader: str = "sharded") -> Any:
    """Every rank; communicates."""
    from zero_sft import load_model

    options = method.load_options if loader == "sharded" else {}
    model = load_model(str(folder), ds_config=setup.ds_config(str(nvme)), dtype=DTYPES[setup.dtype], loader=loader, **options)
    return method.sharded(model)


def steps(model: Any, setup: Setup, nvme: Path) -> tuple[Any, list[float]]:
    """Start an engine and train; return it and the losses. Every rank; communicates."""
    import deepspeed

    trained = [param for param in model.parameters() if param.requires_grad]
    model.train()
    engine, *_ = deepspeed.initialize(model=model, config=setup.ds_config(str(nvme)), model_parameters=trained)
    losses = []
    for step in range(STEPS * setup.batches):
        ids = (IDS + step + 7 * dist.get_rank()) % 131
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return engine, losses


def refusal(call: Callable[[], Any]) -> str:
    """Return the code of the error with which a call is refused; "" if it isn't."""
    try:
        call()
    except ZeroSftError as error:
        return error.code or "an error without a code"
    return ""


def train_stock(folder: Path, setup: Setup, method: Method, nvme: Path, out: Path) -> None:
    """Train after a stock load, and leave its values. Every rank; communicates."""
    model = load(folder, setup, method, nvme, "stock")
    engine, losses = steps(model, setup, nvme)
    trained = values(model)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, losses)
    if dist.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in trained.items()}, out / "stock.safetensors")
        (out / "losses.json").write_text(json.dumps(gathered))
    engine.destroy()


class Trial:
    """Tries the callers one after the other on one model, and keeps what came of each."""

    def __init__(self, folder: Path, reference: Path, setup: Setup, method: Method, nvme: Path, out: Path) -> None:
        self.results: dict[str, str] = {}
        self._reference, self._setup, self._method, self._nvme, self._out = reference, setup, method, nvme, out
        self.dtype = DTYPES[setup.dtype]
        with zero3_under(None):
            self.plain = method.plain(models.plain(reference, self.dtype)).eval()
        self.model = load(folder, setup, method, nvme)
        self.engine: Any = None

    def run(self) -> None:
        """Every rank; communicates."""
        for name, caller in self._callers():
            with self._kept(name):
                caller()

    def _callers(self) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "loaded values", self._same_values
        before = (
            ("forward", self._forward), ("generate", self._generate), ("counts", self._counts),
            ("state_dict", self._state_dict), ("load_state_dict", self._load_state_dict), ("copy, move", self._copy),
        )  # fmt: skip
        yield from before
        yield "three steps", self._steps
        yield from before
        yield "resize", self._refuses_to_resize
        yield "save_pretrained", self._save

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        if self.results.get(name, "passed") == "passed":
            try:
                yield
                self.results[name] = "passed"
            except ZeroSftError as error:
                self.results[name] = f"refused: {error.code}"
            except Exception:
                self.results[name] = traceback.format_exc()

    @property
    def _quantised(self) -> bool:
        return bool(self._method.load_options)

    def _same_values(self) -> None:
        expected = dict(self.plain.named_parameters())
        for name, value in values(self.model).items():
            if value.dim() != 1 or expected[name].dim() == 1:  # not one of 4-bit codes, which are compared by the logits
                assert torch.equal(value, expected[name].detach()), name

    def _close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        is_exact = self.dtype is torch.float32 and not (self._setup.autocast and self.engine)
        close = {"rtol": 1e-5, "atol": 1e-5} if is_exact else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(found.float(), expected.float(), **close)

    def _forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self._close((self.engine or self.model)(input_ids=IDS).logits, self.plain(input_ids=IDS).logits)

    def _generate(self) -> None:
        self.model.eval()
        for options in ({"do_sample": False}, {"do_sample": True, "top_k": 3}, {"do_sample": False, "synced_gpus": True}):
            found = []
            for model in (self.model, self.plain):
                torch.manual_seed(4)
                with torch.no_grad():
                    found.append(model.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, **options))
            assert found[0].shape == found[1].shape
            if self.dtype is torch.float32:
                assert torch.equal(*found), options

    def _counts(self) -> None:
        import zero_sft

        assert self.model.num_parameters() == self.plain.num_parameters()
        assert self.model.num_parameters(only_trainable=True) == self.plain.num_parameters(only_trainable=True)
        if not self._quantised:
            assert self.model.get_memory_footprint() == self.plain.get_memory_footprint()
            assert repr(self.model) == repr(self.plain)
            for name, param in self.plain.named_parameters():
                assert zero_sft.full_shape(self.model.get_parameter(name)) == tuple(param.shape), name

    def _state_dict(self) -> None:
        import deepspeed

        base, plain = (getattr(model, "get_base_model", lambda model=model: model)() for model in (self.model, self.plain))
        code = refusal(base.state_dict)
        assert code in ("model.state_dict_of_shards", "")
        if not code:  # an engine keeps small parameters gathered: here all of them
            state = base.state_dict()
            assert all(torch.equal(state[name].cpu(), value) for name, value in plain.state_dict().items())
        if any(param.ds_tensor.final_location for param in self.model.parameters()):
            return  # DeepSpeed has too few swap buffers to gather all that is on NVMe at once
        expected = self.plain.state_dict()
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            for name, tensor in self.model.state_dict().items():
                if tensor.shape == expected[name].shape:
                    assert torch.equal(tensor.cpu(), expected[name]), name

    def _load_state_dict(self) -> None:
        base, plain = (getattr(model, "get_base_model", lambda model=model: model)() for model in (self.model, self.plain))
        state = plain.state_dict()
        if self.engine is None and not self._quantised:
            base.load_state_dict(state)
            self._same_values()
            return
        code = "model.engine_has_started" if self.engine else "model.other_state_dict"
        assert refusal(lambda: base.load_state_dict(state)) == code

    def _copy(self) -> None:
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        assert refusal(lambda: copy.deepcopy(base)) == "model.deepcopy"
        assert refusal(lambda: base.to("meta")) == "model.moved"

    def _steps(self) -> None:
        self.engine, losses = steps(self.model, self._setup, self._nvme)
        expected = json.loads((self._out / "losses.json").read_text())[dist.get_rank()]
        # Muon computes in bf16 with the parameters of a group together; after a stock load DeepSpeed orders adapters otherwise.
        is_exact = not (self._setup.muon and isinstance(self._method, Lora))
        assert losses == expected if is_exact else losses == pytest.approx(expected, rel=1e-4), (losses, expected)
        trained, moved = load_file(self._out / "stock.safetensors"), False
        for name, value in values(self.model).items():
            plain = self.plain.get_parameter(name)
            if value.shape == plain.shape:
                torch.testing.assert_close(value, trained[name], rtol=0, atol=0 if is_exact else 3e-3)
                moved = moved or not torch.equal(value, plain)
                plain.data.copy_(value)
        assert moved

    def _refuses_to_resize(self) -> None:
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        assert refusal(lambda: base.resize_token_embeddings(140)) == "model.engine_has_started"

    def _save(self) -> None:
        from peft import PeftModel

        from zero_sft import save_pretrained

        save_pretrained(self.engine, self._out / "saved")
        dist.barrier()
        if isinstance(self.plain, PeftModel):
            base = models.plain_again(self._reference, self.dtype)
            with zero3_under(None):
                opened = PeftModel.from_pretrained(base, self._out / "saved", autocast_adapter_dtype=False)
        else:
            opened = models.plain_again(self._out / "saved", self.dtype)
        expected = dict(self.plain.named_parameters())
        for name, param in opened.named_parameters():
            assert torch.equal(param, expected[name]), name


def try_callers(folder: Path, reference: Path, setup: Setup, method: Method, nvme: Path, out: Path) -> None:
    """Try all callers but the one that changes the model's shape; leave the results. Every rank; communicates."""
    trial = Trial(folder, reference, setup, method, nvme, out)
    trial.run()
    _leave(trial.results, out / "results.json")


def try_resize(folder: Path, reference: Path, setup: Setup, method: Method, nvme: Path, out: Path) -> None:
    """Try another number of tokens, before the adapters. Every rank; communicates."""
    from zero_sft import load_model

    result = "passed"
    try:
        with zero3_under(None):
            plain = models.plain(reference, DTYPES[setup.dtype])
            torch.manual_seed(8)
            plain.resize_token_embeddings(140)
        model: Any = load_model(
            str(folder), ds_config=setup.ds_config(str(nvme)), dtype=DTYPES[setup.dtype], **method.load_options
        )
        torch.manual_seed(8 + dist.get_rank())
        model.resize_token_embeddings(140)
        expected = dict(plain.named_parameters())
        for name, value in values(model).items():
            if value.shape == expected[name].shape:
                assert torch.equal(value, expected[name].detach()), name
        assert model.get_input_embeddings().num_embeddings == 140
        steps(method.sharded(model), setup, nvme)[0].destroy()
    except Exception:
        result = traceback.format_exc()
    _leave({"resize": result}, out / "resize.json")


def _leave(results: dict[str, str], path: Path) -> None:
    """Write the results of all ranks: of each, the worst. Every rank; communicates."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        worst = {name: max((each[name] for each in gathered), key=lambda text: (text != "passed", text)) for name in results}
        path.write_text(json.dumps(worst))
