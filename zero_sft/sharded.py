"""The sharded load: skeleton, index, names, plan, reads, and what the checkpoint lacks.

`pretrained.py` is the public face; here is the work, one function a step. Every rank runs all of it. Between two agreements
nothing communicates, so a rank that fails never leaves the others in a collective.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from zero_sft import distributed, skeleton, transformers_internals
from zero_sft.checkpoint.index import CheckpointIndex, open_index
from zero_sft.conversion.convert import Resolution, resolve
from zero_sft.distributed import World, agreed
from zero_sft.errors import CheckpointError
from zero_sft.plan.partition import whole_range
from zero_sft.plan.plan import Plan, Target, plan_reads
from zero_sft.report import LoadReport
from zero_sft.request import Request
from zero_sft.storage import reader
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.zero import gather, internals, missing, shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A model on its way: its skeleton, what the checkpoint has for it, and the names that will share another's tensor."""

    model: PreTrainedModel
    state: Mapping[str, torch.Tensor]  # the whole state dict, on meta
    index: CheckpointIndex
    resolution: Resolution
    away: Mapping[str, str]
    tensors: Mapping[str, Any]  # the model's own parameters and buffers, by name

    def tensor(self, name: str) -> Any:
        """The model's parameter or buffer of that name."""
        return self.tensors[name]

    def lacking(self) -> list[str]:
        """The names that the checkpoint does not fill and no tie provides."""
        return [name for name in self.state if name not in self.resolution.sources and name not in self.away]


def load_sharded(request: Request, world: World, report: LoadReport) -> PreTrainedModel:
    """Load the model, every rank its own bytes. Every rank; communicates only to agree.

    Raises:
        ZeroSftError: the same on every rank.
    """
    watch = Stopwatch(report)
    with watch.stage("skeleton"), agreed(world, "building the model"):
        internals.check()
        transformers_internals.check()
        _require_plain_weights(request)
        bare = skeleton.build(request)
    with watch.stage("plan"), agreed(world, "reading the checkpoint's headers"):
        draft = _draft(bare, open_index(request.folder))
        plan = plan_rank(draft)
    agreed_on = {
        "index": draft.index.digest(),
        "names": sorted(draft.resolution.sources),
        "transformers": transformers.__version__,
    }
    distributed.agree_on(world, "checkpoint", agreed_on)
    with watch.stage("read"), agreed(world, "reading the weights"):
        _read(draft, plan, threads=max(1, min(4, _cores() // world.local_world_size)))
    with watch.stage("finish"):
        _finish(draft, request, world, report)
    _account(report, draft, plan)
    return draft.model


def _draft(bare: skeleton.Skeleton, index: CheckpointIndex) -> Draft:
    """Match checkpoint and model, then partition the model: conversions ask it for whole shapes."""
    model, state = bare.model, bare.state
    resolution = resolve(model, state, index.tensors)
    setattr(model, "_weight_conversions", list(resolution.rules_used))  # noqa: B010 - as in from_pretrained
    bare.shard()
    away = missing.tied_away(model.all_tied_weights_keys, resolution.sources)
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in state}
    draft = Draft(model=model, state=state, index=index, resolution=resolution, away=away, tensors=tensors)
    _require_fit(draft)
    return draft


def plan_rank(draft: Draft) -> Plan:
    """The reads of this rank: its range of every parameter, and every buffer whole."""
    targets = []
    for name, regions in draft.resolution.sources.items():
        tensor, whole = draft.tensor(name), draft.state[name]
        span = shards.local_range(tensor) if shards.is_sharded(tensor) else whole_range(whole.numel())
        targets.append(Target(name=name, shape=tuple(whole.shape), span=span, regions=regions))
    return plan_reads(targets, draft.index.tensors)


def _read(draft: Draft, plan: Plan, threads: int) -> None:
    """Give every tensor that the checkpoint fills its memory, and fill it."""
    names = list(draft.resolution.sources)
    params = {name: draft.tensor(name) for name in names if shards.is_sharded(draft.tensor(name))}
    buffers = {
        name: torch.empty(draft.state[name].shape, dtype=draft.state[name].dtype, device=draft.model.device)
        for name in names
        if name not in params
    }
    by_target: dict[str, list] = {}
    for read in plan.reads:
        by_target.setdefault(read.target, []).append(read)

    def fill(memory: Mapping[str, torch.Tensor]) -> None:
        wanted = (by_target[name] for name in memory if name in by_target)
        reads = sorted((read for reads in wanted for read in reads), key=lambda read: (read.file, read.offset_bytes))
        reader.fill(reads, memory, threads)

    shards.fill_shards(params, fill)
    fill({name: buffer.view(-1) for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        draft.model.get_submodule(module)._buffers[leaf] = buffer


def _finish(draft: Draft, request: Request, world: World, report: LoadReport) -> None:
    """Ties, buffers and missing weights; then what `from_pretrained` does last."""
    model = draft.model
    absent = set(draft.state) - set(draft.resolution.sources)
    absent |= _equal_ties(draft, world)
    seed = distributed.exchange(world, torch.initial_seed())[0]
    with agreed(world, "initialising what the checkpoint lacks"):
        lacking = {name: draft.tensor(name) for name in draft.lacking()}
        filled = [name for name in draft.state if name not in lacking]
        params = {name: tensor for name, tensor in lacking.items() if shards.is_sharded(tensor)}
        missing.initialise(model, filled, params, device=model.device, seed=seed)
        info = transformers_internals.loading_info(absent, draft.resolution.unexpected)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        report.missing, report.unexpected = sorted(info.missing_keys), sorted(info.unexpected_keys)
        model.eval()
        skeleton.read_generation_config(model, request)
        gather.install(model)
        skeleton.keep_zero3_enabled(model, request.ds_config)


def _equal_ties(draft: Draft, world: World) -> set[str]:
    """Of ties whose both sides the checkpoint has: the targets that equal their source on every rank, to be tied.

    The others stay apart, and the model's list of ties forgets them, as in plain `from_pretrained`. Communicates.
    """
    sources = draft.resolution.sources
    ties = draft.model.all_tied_weights_keys
    both = [(target, source) for target, source in ties.items() if target in sources and source in sources]
    mine = [shards.same(draft.tensor(target), draft.tensor(source)) for target, source in both]
    everywhere = [all(each) for each in zip(*distributed.exchange(world, mine), strict=True)]
    for (target, _), equal in zip(both, everywhere, strict=True):
        if not equal:
            del ties[target]
    return {target for (target, _), equal in zip(both, everywhere, strict=True) if equal}


def _account(report: LoadReport, draft: Draft, plan: Plan) -> None:
    report.requests, report.bytes_read = len(plan.reads), plan.nbytes
    report.parameters = sum(tensor.numel() for name, tensor in draft.state.items() if name not in draft.away)
    report.tied = sorted(draft.away)
    report.operations = draft.resolution.operations
    for name, regions in sorted(draft.resolution.sources.items()):
        stored = {draft.index.tensors[each].dtype for each in {region.source for region in regions}}
        if stored - {STORED_DTYPES.get(draft.tensor(name).dtype)}:
            report.cast.append(name)


def _require_plain_weights(request: Request) -> None:
    quantised = getattr(request.config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise CheckpointError(
            f"{request.folder} is quantised ({method}); training needs plain weights. Dequantise it once with transformers "
            "(from_pretrained, dequantize, save_pretrained) and name that folder."
        )


def _require_fit(draft: Draft) -> None:
    """Refuse a checkpoint of another model: shapes that differ, or most of the weights absent."""
    mismatched = draft.resolution.mismatched
    if mismatched:
        shown = "; ".join(f"{m.name}: expected {list(m.expected)}, got {list(m.got)}" for m in mismatched[:5])
        more = f" and {len(mismatched) - 5} more" if len(mismatched) > 5 else ""
        raise CheckpointError(
            f"{draft.index.folder}: {len(mismatched)} tensors have another shape than the model's: {shown}{more}. The config "
            "and the weights are of different models: take both from one place."
        )
    wanted = {name: tensor.numel() for name, tensor in draft.state.items() if name not in draft.away}
    present = sum(numel for name, numel in wanted.items() if name in draft.resolution.sources)
    if 2 * present < sum(wanted.values()):
        examples = ", ".join(sorted(draft.lacking())[:3])
        found = ", ".join(sorted(draft.index.tensors)[:3])
        raise CheckpointError(
            f"{draft.index.folder} lacks most of the model's weights ({present:,} of {sum(wanted.values()):,} elements found). "
            f"The model wants {examples}, ...; the files have {found}, .... Name a checkpoint of {type(draft.model).__name__}."
        )


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Stopwatch:
    """Writes seconds by stage, and their sum so far, into a report."""

    def __init__(self, report: LoadReport) -> None:
        self._report = report
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`."""
        start = time.perf_counter()
        yield
        self._report.stages[name] = time.perf_counter() - start
        self._report.seconds = time.perf_counter() - self._start
