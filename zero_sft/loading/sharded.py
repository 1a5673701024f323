"""The sharded load: build the model, read headers, match, initialise, plan, read, compute, finish, verify.

`api.py` has the public functions; here `load_sharded` lists the phases in their order. Every rank runs all of it. Nothing
communicates inside a `collective_stage`, so a rank that fails never leaves the others waiting in a collective. Phases return
their results; `load_sharded` assembles the report at the end.
"""

import contextlib
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from zero_sft import transformers_internals
from zero_sft.checkpoint.index import build_index, find_checkpoint_files
from zero_sft.checkpoint.scaled import ScaledTensor
from zero_sft.cluster.stages import StageExchange, collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.conversion.quantized import dequantize, quantizer_for
from zero_sft.errors import CheckpointError
from zero_sft.four_bit.linear import Linear4bit
from zero_sft.loading import four_bit, skeleton
from zero_sft.loading.headers import read_headers_together
from zero_sft.loading.match import CheckpointMatch, left_out_parts, match_checkpoint
from zero_sft.loading.report import KeyReport, LoadStats
from zero_sft.loading.request import LoadRequest
from zero_sft.loading.untraceable import ComputeCosts, fill_untraceable, materialize
from zero_sft.loading.verify import verify
from zero_sft.plan.partition import full_range
from zero_sft.plan.plan import ReadItem, plan_reads
from zero_sft.printable import first_of, with_count
from zero_sft.storage import reader, torch_zip
from zero_sft.storage.dtypes import STORED_DTYPES
from zero_sft.zero import gather_hooks as gather
from zero_sft.zero import init_weights, internals, shards

logger = logging.getLogger(__name__)


def load_sharded(request: LoadRequest, world: World) -> tuple[PreTrainedModel, KeyReport, LoadStats]:
    """Load the model; every rank reads only the bytes of its shards. Every rank; communicates, but no weights.

    Raises:
        ZeroSftError: the same on every rank.
    """
    watch, options = Stopwatch(world), request.options
    threads = options.reading_threads(world.cpu_cores)
    match = _match(request, world, watch)
    with watch.collective("initialise", "initialising what the checkpoint lacks"):
        already_complete, initial_reads = _initialize(match, request, threads, watch)
        in_4_bits: Mapping[str, Linear4bit] = {}
        if options.load_in_4bit:
            in_4_bits = four_bit.make_4bit_modules(match, options, already_complete)
        sharder = match.skeleton.sharder
        sharder.make_zero_parameters(match.skeleton.model)
        tensors = match.collect_tensors()
    with watch.collective("plan", "planning the reads"):
        to_read = [name for name in match.resolution.source_maps if name not in already_complete | in_4_bits.keys()]
        params = {name: tensors[name] for name in to_read if shards.is_sharded(tensors[name])}
        targets = [(match.resolution.source_maps[name], shards.local_range(param)) for name, param in params.items()]
        reads = plan_reads(targets, match.resolution.stored_tensors)
    with collective_stage(world, "reading the weights", timeout_for_bytes(match.index.nbytes)), watch.phase("read"):
        if request.while_reading is not None:
            request.while_reading()
        _read(params, reads, match, threads)
    if in_4_bits:
        with watch.phase("quantise"):
            reads = (*reads, *four_bit.read_4bit(in_4_bits, match, options, sharder.local_device, world))
    computed = ComputeCosts(reads=(), held_bytes={})
    if match.resolution.untraceable:
        with watch.phase("compute"):
            computed = fill_untraceable(match, tensors, already_complete, world)
    with watch.phase("finish"):
        equal_ties = _drop_unequal_ties(match, tensors, world)
        missing, unexpected = _finish_model(match, request, equal_ties, world)
    verified = None
    if options.verify:
        with watch.phase("verify"), progress.task("verifying the shards"):
            verified = verify(match, match.resolution.filled_names - already_complete, world)
    all_reads = (*initial_reads, *reads, *computed.reads)
    bytes_read = sum(read.total_nbytes for read in all_reads)
    stats = LoadStats(requests=len(all_reads), bytes_read=bytes_read, seconds=watch.seconds, stages=watch.phases)
    keys = _key_report(match, equal_ties, missing, unexpected, computed, verified)
    keys = dataclasses.replace(keys, quantized_keys=sorted(in_4_bits))
    return match.skeleton.model, keys, stats


def _match(request: LoadRequest, world: World, watch: "Stopwatch") -> CheckpointMatch:
    """Build the model without weights, read the checkpoint's headers and match the two. Every rank; communicates."""
    with watch.collective("skeleton", "building the model") as exchange:
        internals.check()
        transformers_internals.check()
        quantizer = quantizer_for(request.model.config, str(request.model.folder))
        model_skeleton = skeleton.build_for_sharding(request.model, request.ds_config)
        files = find_checkpoint_files(request.model.folder, torch_zip.read_bin_header, request.variant)
        exchange.must_match = ("checkpoint's files", files.sizes())
    with watch.phase("headers"), progress.task("reading the checkpoint's headers"):
        headers = read_headers_together(files, world)
    with watch.collective("match", "matching the checkpoint to the model") as exchange:
        index = build_index(files, headers)
        match = match_checkpoint(model_skeleton, index, quantizer, request.options.ignore_mismatched_sizes)
        summary = {
            "index": index.digest(),
            "names": sorted(match.resolution.filled_names),
            "transformers": transformers.__version__,
        }
        exchange.must_match = ("checkpoint", summary)
    return match


def _initialize(
    match: CheckpointMatch, request: LoadRequest, threads: int, watch: "Stopwatch"
) -> tuple[set[str], list[ReadItem]]:
    """Compute buffers and initialise missing weights. Return complete stored names and the reads."""
    resolution, reads = match.resolution, []

    def load(memory: Mapping[str, torch.Tensor]) -> None:
        traced = [name for name in memory if name in resolution.source_maps]
        targets = [(resolution.source_maps[name], full_range(match.skeleton.state[name].numel())) for name in traced]
        planned = plan_reads(targets, resolution.stored_tensors)
        with watch.phase("read"):
            reader.fill(planned, memory, threads, match.index.identities, dequantize)
        reads.extend(planned)
        for name in memory.keys() - resolution.source_maps.keys():
            computed, source_reads = materialize(resolution.untraceable[name], match.full_shape_model, match.index)
            memory[name].copy_(computed[name].reshape(-1))
            reads.extend(source_reads)

    already_complete = init_weights.initialize_missing(
        match.skeleton.model,
        stored_dtypes={name: match.skeleton.state[name].dtype for name in resolution.filled_names},
        tied=match.tied_to,
        load=load,
        build_buffers=lambda: skeleton.constructor_buffers(request.model),
        make_zero_parameter=match.skeleton.sharder.make_zero_parameter,
        device=match.skeleton.sharder.local_device,
        seed=request.seed,
    )
    return already_complete, reads


def _read(params: Mapping[str, Any], reads: Sequence[ReadItem], match: CheckpointMatch, threads: int) -> None:
    """Allocate the shard of every parameter and fill it from the files."""
    by_target: dict[str, list[ReadItem]] = defaultdict(list)
    for read in reads:
        by_target[read.target].append(read)

    with progress.task("reading the weights", sum(read.total_nbytes for read in reads), progress.BYTES) as task:

        def read_shards(memory: Mapping[str, torch.Tensor]) -> None:
            in_memory = [read for name in memory for read in by_target[name]]
            in_memory.sort(key=lambda read: (read.file, read.offset_bytes))
            reader.fill(in_memory, memory, threads, match.index.identities, dequantize, task.advance)

        shards.fill_shards(params, read_shards)


def _drop_unequal_ties(match: CheckpointMatch, tensors: Mapping[str, Any], world: World) -> set[str]:
    """Drop the ties whose two sides are stored and differ on a rank: both tensors stay, as in plain `from_pretrained`.

    Return the targets of the ties whose two sides are stored and equal. Every rank; communicates.
    """
    ties = match.ties_with_both_stored()
    if not ties:
        return set()
    with collective_stage(world, "comparing tied weights") as exchange:
        exchange.local = [name for name, source in ties if not shards.shards_equal(tensors[name], tensors[source])]
    unequal = set().union(*exchange.gathered)
    for name in unequal:
        transformers_internals.drop_tie(match.skeleton.model, name)
    return {target for target, _ in ties} - unequal


def _finish_model(
    match: CheckpointMatch, request: LoadRequest, equal_ties: Set[str], world: World
) -> tuple[list[str], list[str]]:
    """Tie weights, then take the last steps of `from_pretrained`. Return missing and unexpected names.

    Every rank; communicates.
    """
    model, resolution = match.skeleton.model, match.resolution
    stored_or_mismatched = resolution.filled_names | {mismatch.name for mismatch in resolution.mismatched}
    with collective_stage(world, "finishing the model"):
        not_loaded = (match.skeleton.state.keys() - stored_or_mismatched) | equal_ties
        missing, unexpected = transformers_internals.tie_weights(model, not_loaded, resolution.unexpected)
        model.eval()
        skeleton.give_generation_config(model, request.model, world)
        gather.install_gather_hooks(model)
        transformers_internals.keep_zero3_enabled(model, request.ds_config)
    if world.is_main:
        _warn_of_parts_left_out(match)
    # Only now: `tie_weights` drops the names that the model's class allows to be missing or unexpected.
    if request.options.strict and (missing or unexpected):
        raise CheckpointError(_strict_message(request, missing, unexpected), code="checkpoint.not_strict")
    return missing, unexpected


def _warn_of_parts_left_out(match: CheckpointMatch) -> None:
    if parts := left_out_parts(match.resolution.unexpected, match.skeleton.state):
        logger.warning(
            "%s has no place for parts of this checkpoint, which are left out, here and in what is saved: %s",
            type(match.skeleton.model).__name__,
            first_of((f"{part} ({with_count(count, 'tensor')})" for part, count in parts.items()), 8),
        )


def _key_report(
    match: CheckpointMatch,
    ties: Set[str],
    missing: list[str],
    unexpected: list[str],
    computed: ComputeCosts,
    verified: int | None,
) -> KeyReport:
    resolution, tensors = match.resolution, match.collect_tensors()
    cast, dequantized = [], []
    for name, source_map in sorted(resolution.source_maps.items()):
        stored = [resolution.stored_tensors[source] for source in {region.source for region in source_map.regions}]
        if any(isinstance(tensor, ScaledTensor) for tensor in stored):
            dequantized.append(name)
        elif {tensor.dtype for tensor in stored} - {STORED_DTYPES.get(tensors[name].dtype)}:
            cast.append(name)
    return KeyReport(
        parameters=shards.parameter_numel(match.skeleton.model),
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=[(mismatch.name, mismatch.expected, mismatch.got) for mismatch in resolution.mismatched],
        duplicate_keys=list(match.index.duplicate_keys),
        tied_keys=sorted(match.tied_to.keys() | ties),
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
            lines.append(f"  {kind}: {first_of(names, 5)}")
    return "\n".join([*lines, "Take the checkpoint of exactly this model, or leave strict off."])


class Stopwatch:
    """Wall time of a load in seconds, in all and by phase, for `LoadReport.stages`."""

    def __init__(self, world: World) -> None:
        self.phases: dict[str, float] = {}
        self.seconds = 0.0
        self._world = world
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to that of `name`, without the phases inside the body."""
        start, before = time.perf_counter(), sum(self.phases.values())
        self.phases.setdefault(name, 0.0)
        yield
        now = time.perf_counter()
        self.phases[name] += now - start - (sum(self.phases.values()) - before)
        self.seconds = now - self._start

    @contextlib.contextmanager
    def collective(self, phase: str, stage: str) -> Iterator[StageExchange]:
        """Run the body as a `collective_stage` under `phase`, with its progress. Every rank; communicates at the end."""
        with collective_stage(self._world, stage) as exchange, progress.task(stage), self.phase(phase):
            yield exchange
