"""The sharded load: build the model, match the checkpoint, plan and read, initialise what the checkpoint lacks.

`api.py` has the public functions; this module does the work, one function per stage. Every rank runs all of it. Nothing
communicates inside a `collective_stage`, so a rank that fails never leaves the others waiting in a collective. Stages return
their results; `load_sharded` assembles the report at the end.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
import transformers

from zero_sft import transformers_internals
from zero_sft.checkpoint.index import build_index, find_checkpoint_files, read_headers
from zero_sft.checkpoint.scaled import ScaledTensor
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.quantized import dequantize, quantizer_for
from zero_sft.errors import CheckpointError
from zero_sft.loading import skeleton
from zero_sft.loading.headers import read_headers_together
from zero_sft.loading.match import CheckpointMatch, left_out_parts, match_checkpoint
from zero_sft.loading.report import KeyReport, Loaded, LoadStats
from zero_sft.loading.request import LoadRequest
from zero_sft.loading.untraceable import Materialized, fill_untraceable, materialize
from zero_sft.loading.verify import ShardDigest, digest, verify
from zero_sft.plan.partition import FlatRange, full_range
from zero_sft.plan.plan import FillTarget, Plan, ReadItem, plan_reads
from zero_sft.storage import reader, torch_zip
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.zero import gather_hooks as gather
from zero_sft.zero import init_weights, internals, shards

_PROGRESS_TITLES = {
    "skeleton": "building the model",
    "headers": "reading the checkpoint's headers",
    "plan": "planning the reads",
    "initialise": "initialising what the checkpoint lacks",
    "verify": "verifying the shards",
}
"""Titles of the stages in progress bars."""

logger = logging.getLogger(__name__)


def load_sharded(request: LoadRequest, world: World) -> Loaded:
    """Load the model; every rank reads only the bytes of its shards. Every rank; communicates, but no weights.

    Raises:
        ZeroSftError: the same on every rank.
    """
    watch = Stopwatch()
    options = request.options
    with collective_stage(world, "building the model") as exchange, watch.phase("skeleton"):
        internals.check()
        transformers_internals.check()
        quantizer = quantizer_for(request.model.config, str(request.model.folder))
        model_skeleton = skeleton.build_sharded(request.model, request.ds_config)
        files = find_checkpoint_files(request.model.folder, torch_zip.read_header, request.variant)
        exchange.must_match = ("checkpoint's files", files.sizes())
    with watch.phase("headers"):
        headers = read_headers_together(files, world)
    with collective_stage(world, "planning the reads") as exchange, watch.phase("plan"):
        index = build_index(files, headers or read_headers(files))
        match = match_checkpoint(model_skeleton, index, quantizer, options.ignore_mismatched_sizes)
        exchange.must_match = ("checkpoint", _match_summary(match))
    threads = options.reading_threads(world.cpu_cores)
    with collective_stage(world, "reading the weights") as exchange:
        with watch.phase("initialise"):
            initialised = _initialise(match, request, threads)
        tensors = match.collect_tensors()
        with watch.phase("read"):
            traced = [name for name in match.resolution.sources if name not in initialised and shards.is_sharded(tensors[name])]
            plan = plan_rank(match, {name: tensors[name] for name in traced})
            if request.while_reading is not None:
                request.while_reading()
            _read({name: tensors[name] for name in traced}, plan, match, threads)
        exchange.local = [] if match.resolution.computed else _equal_ties(match, tensors)
    equal_ties, computed = exchange.gathered, Materialized(read_bytes=0, held_bytes={})
    if match.resolution.computed:
        with watch.phase("compute"):
            computed = fill_untraceable(match, tensors, initialised, world)
            equal_ties = all_gather_json(world, _equal_ties(match, tensors))
    with watch.phase("finish"):
        missing, unexpected = _finish(match, request, world, equal_ties)
    _warn_of_parts_left_out(match, world)
    if options.strict and (missing or unexpected):
        raise CheckpointError(_strict_message(request, missing, unexpected), code="checkpoint.not_strict")
    verified = None
    if options.verify:
        with watch.phase("verify"):
            verified = _verify(match, world, initialised)
    return Loaded(
        model=match.model,
        keys=_key_report(match, missing, unexpected, computed, verified),
        stats=LoadStats(
            requests=len(plan.reads),
            bytes_read=plan.nbytes + computed.read_bytes,
            seconds=watch.seconds,
            stages=watch.phases,
        ),
    )


def _match_summary(match: CheckpointMatch) -> dict[str, Any]:
    """Summarise what all ranks must agree on before they read: stored tensors, the names that they fill, conversion rules."""
    return {
        "index": match.index.digest(),
        "names": sorted(match.resolution.loaded),
        "transformers": transformers.__version__,
    }


def _initialise(match: CheckpointMatch, request: LoadRequest, threads: int) -> set[str]:
    """Compute buffers, initialise missing weights, partition the model. Return the loaded names that are then complete."""
    resolution = match.resolution

    def load(memory: Mapping[str, torch.Tensor]) -> None:
        traced = [name for name in memory if name in resolution.sources]
        targets = [_target(match, name, full_range(match.state[name].numel())) for name in traced]
        _fill(plan_reads(targets, resolution.stored).reads, memory, match, threads)
        for name in memory.keys() - resolution.sources.keys():
            computed, _ = materialize(resolution.computed[name], match.full_shape_model, match.index)
            memory[name].copy_(computed[name].reshape(-1))

    initialised = init_weights.initialize_missing(
        match.model,
        loaded={name: match.state[name].dtype for name in resolution.loaded},
        tied=match.tied_to,
        load=load,
        build_buffers=lambda: skeleton.constructor_buffers(request.model),
        shard=match.skeleton.init.shard_parameter,
        device=match.skeleton.init.local_device,
        seed=request.seed,
    )
    match.skeleton.shard()
    return initialised


def _target(match: CheckpointMatch, name: str, flat_range: FlatRange) -> FillTarget:
    return FillTarget(source_map=match.resolution.sources[name], flat_range=flat_range)


def plan_rank(match: CheckpointMatch, params: Mapping[str, Any]) -> Plan:
    """Plan the reads of this rank: its flat range of every parameter. Any rank; does not communicate."""
    targets = [_target(match, name, shards.local_range(param)) for name, param in params.items()]
    return plan_reads(targets, match.resolution.stored)


def _read(params: Mapping[str, Any], plan: Plan, match: CheckpointMatch, threads: int) -> None:
    """Allocate the shard of every parameter and fill it from the files."""
    by_target: dict[str, list] = {}
    for read in plan.reads:
        by_target.setdefault(read.target, []).append(read)

    def fill(memory: Mapping[str, torch.Tensor]) -> None:
        reads = [read for name in memory for read in by_target.get(name, ())]
        reads.sort(key=lambda read: (read.file, read.offset_bytes))
        _fill(reads, memory, match, threads, task.advance)

    with progress.task("reading the weights", sum(read.total_nbytes for read in plan.reads), progress.BYTES) as task:
        shards.fill_shards(params, fill)


def _fill(
    reads: Sequence[ReadItem],
    memory: Mapping[str, torch.Tensor],
    match: CheckpointMatch,
    threads: int,
    advance: Callable[[int], None] | None = None,
) -> None:
    reader.fill(reads, memory, threads, match.index.identities, dequantize, advance)


def _finish(
    match: CheckpointMatch, request: LoadRequest, world: World, equal_ties: Sequence[Sequence[bool]]
) -> tuple[list[str], list[str]]:
    """Tie weights, then take the last steps of `from_pretrained`. Return missing and unexpected names.

    Every rank; communicates.

    Args:
        equal_ties: the result of `_equal_ties` on every rank.
    """
    model, resolution = match.model, match.resolution
    not_loaded = set(match.state) - resolution.loaded - {mismatch.name for mismatch in resolution.mismatched}
    with collective_stage(world, "tying weights"):
        for (target, _), *equal in zip(match.ties_with_both_stored(), *equal_ties, strict=True):
            if all(equal):
                not_loaded.add(target)
            else:  # both tensors stay, and the tie is dropped, as in plain `from_pretrained`
                del transformers_internals.tied_names(model)[target]
        missing, unexpected = transformers_internals.tie_weights(model, not_loaded, resolution.unexpected)
        model.eval()
        left_out = skeleton.give_generation_config(model, request.model)
        for sentence in left_out if world.is_main else ():
            logger.warning(sentence)
        gather.install_gather_hooks(model)
        skeleton.keep_zero3_enabled(model, request.ds_config)
    return missing, unexpected


def _equal_ties(match: CheckpointMatch, tensors: Mapping[str, Any]) -> list[bool]:
    """For each tie with both sides stored, compare this rank's shards of target and source. Does not communicate."""
    return [shards.shards_equal(tensors[target], tensors[source]) for target, source in match.ties_with_both_stored()]


def _warn_of_parts_left_out(match: CheckpointMatch, world: World) -> None:
    parts = left_out_parts(match.resolution.unexpected, match.state) if world.is_main else {}
    if parts:
        shown = ", ".join(f"{part} ({count} tensor{'s' * (count != 1)})" for part, count in list(parts.items())[:8])
        more = f" and {len(parts) - 8} more" if len(parts) > 8 else ""
        logger.warning(
            "%s has no place for parts of this checkpoint, which are left out, here and in what is saved: %s%s",
            type(match.model).__name__,
            shown,
            more,
        )


def _key_report(
    match: CheckpointMatch, missing: list[str], unexpected: list[str], computed: Materialized, verified: int | None
) -> KeyReport:
    resolution, tensors = match.resolution, match.collect_tensors()
    cast, dequantized = [], []
    for name, source_map in sorted(resolution.sources.items()):
        stored = [resolution.stored[source] for source in {region.source for region in source_map.regions}]
        if any(isinstance(tensor, ScaledTensor) for tensor in stored):
            dequantized.append(name)
        elif {tensor.dtype for tensor in stored} - {STORED_DTYPES.get(tensors[name].dtype)}:
            cast.append(name)
    return KeyReport(
        parameters=sum(tensor.numel() for name, tensor in match.state.items() if name not in match.tied_to),
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=[(mismatch.name, mismatch.expected, mismatch.got) for mismatch in resolution.mismatched],
        duplicate_keys=list(match.index.duplicate_keys),
        tied_keys=sorted(match.tied_to),
        cast_keys=cast,
        dequantized_keys=dequantized,
        untraceable_keys=list(computed.held_bytes.items()),
        operations=resolution.operations,
        verified=verified,
    )


def _strict_message(request: LoadRequest, missing: Sequence[str], unexpected: Sequence[str]) -> str:
    lines = [f"{request.model.folder} does not have exactly the model's weights, and strict is on:"]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            lines.append(f"  {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})")
    return "\n".join([*lines, "Take the checkpoint of exactly this model, or leave strict off."])


def _verify(match: CheckpointMatch, world: World, initialised: Set[str]) -> int:
    """Compare this rank's shards with the files. Leave out names that the model's initialisation changed. Communicates."""
    tensors = match.collect_tensors()
    with collective_stage(world, "hashing the shards"):
        held = {name: _shard_digest(tensors[name]) for name in match.resolution.loaded if name not in initialised}
    return verify(match.model, match.state, match.resolution.groups, match.index, held, world)


def _shard_digest(tensor: torch.Tensor) -> ShardDigest:
    """Hash this rank's part of a tensor. A shard on NVMe is in memory only during this call."""
    if not shards.is_sharded(tensor):
        return ShardDigest(digest=digest(tensor), dtype=tensor.dtype, parts=1)
    param: Any = tensor
    shard = shards.local_shard(param)
    shard_digest = ShardDigest(digest=digest(shard), dtype=shard.dtype, parts=shards.num_partitions(param))
    shards.release_shard(param)
    return shard_digest


class Stopwatch:
    """Wall time of a load in seconds, by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.seconds = 0.0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body under `name` and show its progress. The reads show a byte counter themselves."""
        start = time.perf_counter()
        with progress.task(_PROGRESS_TITLES[name]) if name in _PROGRESS_TITLES else contextlib.nullcontext():
            yield
        self.phases[name] = time.perf_counter() - start
        self.seconds = time.perf_counter() - self._start
