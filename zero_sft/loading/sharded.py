"""The sharded load: skeleton, index, names, plan, reads, and what the checkpoint lacks.

`pretrained.py` is the public face; here is the work, one function a step. Every rank runs all of it. Between two agreements
nothing communicates, so a rank that fails never leaves the others in a collective.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from zero_sft import distributed, progress, transformers_internals
from zero_sft.checkpoint.index import assemble, locate, read_headers
from zero_sft.checkpoint.scaled import ScaledTensor
from zero_sft.conversion.quantised import dequantise, quantizer_for
from zero_sft.distributed import agreed
from zero_sft.errors import CheckpointError
from zero_sft.loading import skeleton
from zero_sft.loading.headers import read_headers_together
from zero_sft.loading.match import Draft, left_out_parts, meet
from zero_sft.loading.report import LoadReport
from zero_sft.loading.request import Request
from zero_sft.loading.untraceable import compute, fill_computed
from zero_sft.loading.verify import Held, digest, verify
from zero_sft.plan.partition import FlatRange, whole_range
from zero_sft.plan.plan import Plan, Read, Target, plan_reads
from zero_sft.storage import reader, torch_zip
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.storage.mapped import map_cached
from zero_sft.world import World
from zero_sft.zero import gather, internals, shards
from zero_sft.zero import init_weights as missing

_SHOWN = {
    "skeleton": "building the model",
    "headers": "reading the checkpoint's headers",
    "plan": "planning the reads",
    "initialise": "initialising what the checkpoint lacks",
    "verify": "verifying the shards",
}
"""How stages are called where progress is shown."""
logger = logging.getLogger(__name__)

BUFFER_MIB_A_THREAD = 16
"""What a reading thread holds at most: two staging buffers, or a tile that is multiplied by its scales."""


def load_sharded(request: Request, world: World, report: LoadReport) -> PreTrainedModel:
    """Load the model, every rank its own bytes. Every rank; communicates only to agree.

    Raises:
        ZeroSftError: the same on every rank.
    """
    watch = Stopwatch(report)
    with agreed(world, "building the model") as told, watch.stage("skeleton"):
        internals.check()
        transformers_internals.check()
        quantizer = quantizer_for(request.config, str(request.folder))
        bare = skeleton.build(request)
        files = locate(request.folder, torch_zip.read_header, request.variant)
        told.same = ("checkpoint's files", files.sizes())
    with watch.stage("headers"):
        headers = read_headers_together(files, world)
    with agreed(world, "planning the reads") as told, watch.stage("plan"):
        index = assemble(files, headers or read_headers(files))
        threads = max(1, min(request.buffer_mib // BUFFER_MIB_A_THREAD, world.cpu_cores))
        draft = meet(bare, index, quantizer, threads, request.checks.ignore_mismatched_sizes)
        told.same = ("checkpoint", _understood(draft))
    with agreed(world, "reading the weights") as told:
        with watch.stage("initialise"):
            ready = _initialise(draft, request)
        with watch.stage("read"):
            tensors = draft.tensors()
            wanted = [name for name in draft.resolution.sources if name not in ready and shards.is_sharded(tensors[name])]
            plan = plan_rank(draft, {name: tensors[name] for name in wanted})
            if request.while_reading is not None:
                request.while_reading()
            report.bytes_mapped = _read(draft, {name: tensors[name] for name in wanted}, plan, request.mmap)
        told.mine = None if draft.resolution.computed else _equal_ties(draft)
    if draft.resolution.computed:
        with watch.stage("compute"):
            fill_computed(draft, ready, world, report)
            told.everyone = distributed.exchange(world, _equal_ties(draft))
    with watch.stage("finish"):
        _finish(draft, request, world, report, told.everyone)
    _account(report, draft, plan)
    if world.is_main and (parts := left_out_parts(draft.resolution.unexpected, draft.state)):
        shown = ", ".join(f"{part} ({count} tensor{'s' * (count != 1)})" for part, count in list(parts.items())[:8])
        more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
        logger.warning(
            "%s has no place for parts of this checkpoint, which are left out, here and in what is saved: %s%s",
            type(draft.model).__name__,
            shown,
            more,
        )
    if request.checks.strict and (report.missing or report.unexpected):
        raise CheckpointError(_not_strict(request, report), code="checkpoint.not_strict")
    if request.checks.verify:
        with watch.stage("verify"):
            report.verified = _verify(draft, world, ready)
    return draft.model


def _understood(draft: Draft) -> dict[str, Any]:
    """What ranks must see alike before they read: the tensors in the files, the names that they fill, and the rules."""
    return {
        "index": draft.index.digest(),
        "names": sorted(draft.resolution.loaded),
        "transformers": transformers.__version__,
    }


def _initialise(draft: Draft, request: Request) -> set[str]:
    """Buffers and what the checkpoint lacks, then partition the model. Returns the loaded names that are ready by that."""

    def load(memory: Mapping[str, torch.Tensor]) -> None:
        traced = [name for name in memory if name in draft.resolution.sources]
        targets = [_target(draft, name, whole_range(draft.state[name].numel())) for name in traced]
        _fill(draft, plan_reads(targets, draft.resolution.stored).reads, memory)
        for name in memory.keys() - draft.resolution.sources.keys():
            made, _ = compute(draft.resolution.computed[name], draft.whole, draft.index)
            memory[name].copy_(made[name].reshape(-1))

    ready = missing.initialise(
        draft.model,
        loaded={name: draft.state[name].dtype for name in draft.resolution.loaded},
        tied=draft.away,
        load=load,
        build_buffers=lambda: skeleton.buffers(request),
        shard=draft.bare.init.shard_parameter,
        device=draft.bare.init.local_device,
        seed=request.seed,
    )
    draft.bare.shard()
    return ready


def _target(draft: Draft, name: str, span: FlatRange) -> Target:
    return Target(makeup=draft.resolution.sources[name], span=span)


def plan_rank(draft: Draft, params: Mapping[str, Any]) -> Plan:
    """The reads of this rank: its range of every parameter."""
    targets = [_target(draft, name, shards.local_range(param)) for name, param in params.items()]
    return plan_reads(targets, draft.resolution.stored)


def _read(draft: Draft, params: Mapping[str, Any], plan: Plan, mmap: bool) -> int:
    """Give every parameter its shard: the mapped file where it may be and is cached, else memory that is filled.

    Returns:
        The bytes that were mapped.
    """
    mapped = map_cached(plan.reads, shards.mappable(params), draft.index.stamps) if mmap else {}
    by_target: dict[str, list] = {}
    for read in plan.reads:
        by_target.setdefault(read.target, []).append(read)
    for name, shard in mapped.items():
        shards.attach(params[name], shard)
        file = by_target[name][0].file
        gather.mark_mapped(params[name], file, draft.index.stamps[file])

    def fill(memory: Mapping[str, torch.Tensor]) -> None:
        wanted = (by_target[name] for name in memory if name in by_target)
        reads = sorted((read for reads in wanted for read in reads), key=lambda read: (read.file, read.offset_bytes))
        _fill(draft, reads, memory, task.advance)

    left = sum(read.nbytes_in_all for name, reads in by_target.items() if name not in mapped for read in reads)
    with progress.task("reading the weights", left, progress.BYTES) as task:
        shards.fill_shards({name: param for name, param in params.items() if name not in mapped}, fill)
    return sum(shard.nbytes for shard in mapped.values())


def _fill(
    draft: Draft, reads: Sequence[Read], memory: Mapping[str, torch.Tensor], advance: Callable[[int], None] | None = None
) -> None:
    reader.fill(reads, memory, draft.threads, draft.index.stamps, dequantise, advance)


def _finish(draft: Draft, request: Request, world: World, report: LoadReport, equal_ties: Sequence[Sequence[bool]]) -> None:
    """Ties; then what `from_pretrained` does last. `equal_ties` are every rank's `_equal_ties`."""
    model = draft.model
    absent = set(draft.state) - draft.resolution.loaded - {each.name for each in draft.resolution.mismatched}
    with agreed(world, "tying weights"):
        for (target, _), *equal in zip(_doubled_ties(draft), *equal_ties, strict=True):
            if all(equal):
                absent.add(target)
            else:  # they stay apart, and the model's list of ties forgets them, as in plain `from_pretrained`
                del model.all_tied_weights_keys[target]
        info = transformers_internals.loading_info(absent, draft.resolution.unexpected)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
        report.missing, report.unexpected = sorted(info.missing_keys), sorted(info.unexpected_keys)
        model.eval()
        left_out = skeleton.give_generation_config(model, request)
        for sentence in left_out if world.is_main else ():
            logger.warning(sentence)
        gather.install(model)
        skeleton.keep_zero3_enabled(model, request.ds_config)


def _doubled_ties(draft: Draft) -> list[tuple[str, str]]:
    """The ties, target and source, whose both sides the checkpoint has."""
    loaded = draft.resolution.loaded
    ties = draft.model.all_tied_weights_keys
    return [(target, source) for target, source in ties.items() if target in loaded and source in loaded]


def _equal_ties(draft: Draft) -> list[bool]:
    """For each of `_doubled_ties`: does this rank's part of the target equal that of its source?"""
    tensors = draft.tensors()
    return [shards.same(tensors[target], tensors[source]) for target, source in _doubled_ties(draft)]


def _account(report: LoadReport, draft: Draft, plan: Plan) -> None:
    report.requests += len(plan.reads)
    report.bytes_read += plan.nbytes
    report.parameters = sum(tensor.numel() for name, tensor in draft.state.items() if name not in draft.away)
    report.tied = sorted(draft.away)
    report.doubled = list(draft.index.doubled)
    report.operations = draft.resolution.operations
    report.mismatched = [(each.name, each.expected, each.got) for each in draft.resolution.mismatched]
    tensors = draft.tensors()
    for name, makeup in sorted(draft.resolution.sources.items()):
        parts = [draft.resolution.stored[each] for each in {region.source for region in makeup.regions}]
        if any(isinstance(part, ScaledTensor) for part in parts):
            report.dequantised.append(name)
            continue
        stored = {part.dtype for part in parts}
        if stored - {STORED_DTYPES.get(tensors[name].dtype)}:
            report.cast.append(name)


def _not_strict(request: Request, report: LoadReport) -> str:
    lines = [f"{request.folder} does not have exactly the model's weights, and strict is on:"]
    for kind in ("missing", "unexpected"):
        names = getattr(report, kind)
        if names:
            lines.append(f"  {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})")
    return "\n".join([*lines, "Take the checkpoint of this very model, or leave strict off."])


def _verify(draft: Draft, world: World, ready: Set[str]) -> int:
    """Hash what this rank holds against the files; what the model's own initialisation has changed is left out."""
    tensors = draft.tensors()
    with agreed(world, "hashing the shards"):
        held = {name: _held(tensors[name]) for name in draft.resolution.loaded if name not in ready}
    return verify(draft.model, draft.state, draft.resolution.groups, draft.index, held, world)


def _held(tensor: torch.Tensor) -> Held:
    """Hash this rank's part of a tensor; one that lives on NVMe is in memory only for that."""
    if not shards.is_sharded(tensor):
        return Held(digest=digest(tensor), dtype=tensor.dtype, parts=1)
    param: Any = tensor
    shard = shards.local_shard(param)
    held = Held(digest=digest(shard), dtype=shard.dtype, parts=shards.partitions(param))
    shards.release_shard(param)
    return held


class Stopwatch:
    """Writes seconds by stage, and their sum so far, into a report."""

    def __init__(self, report: LoadReport) -> None:
        self._report = report
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`, and show that it is under way; the reads show more, their bytes."""
        start = time.perf_counter()
        with progress.task(_SHOWN[name]) if name in _SHOWN else contextlib.nullcontext():
            yield
        self._report.stages[name] = time.perf_counter() - start
        self._report.seconds = time.perf_counter() - self._start
