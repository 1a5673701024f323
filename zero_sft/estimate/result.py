"""Results of estimates: one as text or as numbers, several as a Markdown document."""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from zero_sft.adapters.options import LoraOptions
from zero_sft.data.packing import resolve_packing
from zero_sft.estimate.memory_needs import INTERPRETER_BYTES, RUNTIME_BYTES, MemoryModel, MemoryNeeds, TrainingRun
from zero_sft.estimate.model import EstimatedModel, find_model
from zero_sft.estimate.simulate import RankLoad, load_seconds, simulate_load
from zero_sft.estimate.storage_profiles import parse_storage
from zero_sft.hub.options import HubOptions
from zero_sft.loading.options import LoadOptions
from zero_sft.options.keywords import pick_options
from zero_sft.printable import with_count
from zero_sft.rope import text_config

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Estimate of one model with one world size."""

    model: EstimatedModel
    run: TrainingRun
    loads: Sequence[RankLoad]
    storage: str
    load_seconds: float
    needs: MemoryNeeds
    other_activations: int
    remedies: Sequence[str]
    planning_seconds: float
    adapter_numel: int | None = None
    in_4_bits: bool = False

    @property
    def device(self) -> dict[str, int]:
        """Bytes on a device at its peak, by purpose."""
        memory = self.needs.memory
        return {**memory.device, **memory.phases[memory.longest_phase], "driver, NCCL, kernels": RUNTIME_BYTES}

    @property
    def verdict(self) -> str:
        """One line that says whether the run fits, or what would."""
        if self.needs.fits:
            return "fits"
        return "does not fit: try " + (", or ".join(self.remedies) or "a smaller model: none of the shipped configs is enough")

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, in bytes and seconds."""
        return {
            "model": self.model.name, "parameters": self.model.numel, "headers": self.model.headers,
            **dataclasses.asdict(self.run),
            "ranks": [dataclasses.asdict(load) for load in self.loads], "load_seconds": {self.storage: self.load_seconds},
            "device": self.device, "host": dict(self.needs.memory.host), "device_peak": self.needs.device,
            "node_host_peak": self.needs.host, "fits": self.needs.fits, "remedies": list(self.remedies),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        model, run, loads = self.model, self.run, self.loads
        stored = sum(load.nbytes for load in loads)
        yield (
            f"{model.name}: {model.numel / 1e9:,.1f} B parameters, {model.tensors:,} tensors in "
            f"{with_count(model.files, 'file')} (headers {model.headers}), {stored / 1e9:,.1f} GB to be read"
        )
        if self.adapter_numel is not None:
            base = ", the linear modules are in 4 bits" if self.in_4_bits else ""
            yield f"LoRA: {self.adapter_numel / 1e6:,.1f} M parameters are trained{base}"
        shared = f", of which {run.sequence_parallel_size} share each sequence" if run.sequence_parallel_size > 1 else ""
        yield f"on {run.world_size:,} GPUs, {run.ranks_per_node} per node{shared}"
        yield ""
        yield f"  load, each rank {'least':>26}{'median':>12}{'most':>12}"
        for title, values, unit in (
            ("GB read", [load.nbytes for load in loads], 1e9),
            ("read requests", [load.requests for load in loads], 1),
            ("MiB, largest request", [load.largest_bytes for load in loads], 2**20),
            ("MiB, median request", [load.median_bytes for load in loads], 2**20),
        ):
            digits = 0 if unit == 1 else 2
            numbers = (min(values), statistics.median(values), max(values))
            yield f"    {title:26}" + "".join(f"{number / unit:12,.{digits}f}" for number in numbers)
        yield f"    {'load_seconds, ' + self.storage:26}{self.load_seconds:36,.1f}"
        yield f"    planned for all ranks in {self.planning_seconds:.1f} s"
        yield ""
        checkpointing, other = ("with", "without") if run.checkpointing else ("without", "with")
        yield (
            f"  training with {run.ds_config}, {run.batch_size} x {run.length} tokens per GPU{', packed' * run.packing}, "
            f"{checkpointing} checkpointing: GiB of one GPU at its peak ({self.needs.memory.longest_phase})"
        )
        for name, value in self.device.items():
            yield f"    {name:26}{value / GIB:36,.2f}"
        yield f"    {'total':26}{self.needs.device / GIB:36,.2f}  of {run.device_bytes / GIB:,.0f}"
        yield f"    activations would be {self.other_activations / GIB:,.2f} GiB {other} checkpointing"
        rounded = "; torch rounds each block that it page-locks up to a power of two" if self.needs.memory.host else ""
        yield f"  GiB of one node's host: {self.needs.host / GIB:,.1f} of {run.host_bytes / GIB:,.0f}{rounded}"
        for name, value in {**self.needs.memory.host, "interpreter and libraries": INTERPRETER_BYTES}.items():
            yield f"    {name + ', each rank':36}{value / GIB:26,.2f}"
        yield f"  {self.verdict}"


def estimate(name: str, options: Any) -> Iterator[Result]:
    """Yield the estimate of one model for each requested world size.

    Args:
        options: the values of the options of `commands.estimate`.

    Raises:
        ZeroSftError: the model, a config or an argument can't be used.
    """
    hub = pick_options(HubOptions, options)
    profile = parse_storage(options.storage)
    load_options = pick_options(LoadOptions, options)
    model = find_model(name, hub, load_options)
    memory_model = MemoryModel(model, pick_options(LoraOptions, options), load_options)
    packing = resolve_packing(
        options.packing, text_config(model.spec.config), attention=options.attn_implementation, lazy=False
    )
    for world_size in options.world_size:
        run = TrainingRun(
            world_size=world_size,
            ranks_per_node=min(options.ranks_per_node, world_size),
            ds_config=options.deepspeed,
            batch_size=options.per_device_train_batch_size,
            length=options.model_max_length,
            checkpointing=options.activation_checkpointing is not False,
            packing=packing.enabled,
            device_bytes=int(options.gpu_memory_gib * GIB),
            host_bytes=int(options.host_memory_gib * GIB),
            save_async=options.save_async if options.local_save_dir is None else False,
            sequence_parallel_size=options.sequence_parallel_size,
            tiled_mlp=options.tiled_mlp,
        )
        started = time.perf_counter()
        loads = simulate_load(model, world_size)
        planning_seconds = time.perf_counter() - started
        needs = memory_model.needs(run)
        yield Result(
            model=model,
            run=run,
            loads=loads,
            storage=options.storage,
            load_seconds=load_seconds(loads, run.ranks_per_node, profile),
            needs=needs,
            other_activations=memory_model.activation_bytes(dataclasses.replace(run, checkpointing=not run.checkpointing)),
            remedies=[] if needs.fits else list(memory_model.remedies(run)),
            planning_seconds=planning_seconds,
            adapter_numel=memory_model.trained_numel,
            in_4_bits=load_options.load_in_4bit,
        )


def document(results: Sequence[Result], options: Any, command: str) -> str:
    """Return the results as a Markdown document with one table of loads and one of memory; it shows the `command` line."""
    profile = parse_storage(options.storage)
    in_total = f" and {profile.cluster_gb_s:g} GB/s in total" if profile.cluster_gb_s else ""
    headers = " or ".join(sorted({result.model.headers for result in results}))
    lines = [
        "# Needs of loading and training", "", "Written by", "", f"    {command}", "",
        f"The loader's planner ran for every rank on headers that were {headers}. Seconds are for a storage that gives "
        f"{profile.node_gb_s:g} GB/s to a node{in_total}, and takes {profile.request_ms:g} ms per request.",
        "", "## Loading", "",
        "| model | GPUs | GB per rank | requests per rank, median (most) | KiB, median request | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for result in results:
        model, loads = result.model, result.loads
        requests = [load.requests for load in loads]
        lines.append(
            f"| {model.name} ({model.numel / 1e9:,.0f} B) | {result.run.world_size:,} "
            f"| {max(load.nbytes for load in loads) / 1e9:,.2f} | {statistics.median(requests):,.0f} ({max(requests):,}) "
            f"| {statistics.median(load.median_bytes for load in loads) / 1024:,.0f} "
            f"| {result.load_seconds:,.1f} |"
        )
    run = results[0].run
    lines += [
        "", "## Training", "",
        f"{run.batch_size} x {run.length:,} tokens per GPU, {'with' if run.checkpointing else 'without'} checkpointing, "
        f"{run.ds_config}; GPUs of {run.device_bytes / GIB:,.0f} GiB, hosts of {run.host_bytes / GIB:,.0f} GiB, "
        f"{options.ranks_per_node} GPUs per node. GiB of one GPU. The total is the peak of a step, to which activations belong "
        "unless the optimizer's step is the peak.", "",
        "| model | GPUs | states | activations | other | total | |", "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    for result in results:
        device = result.device
        states = sum(device.get(key, 0) for key in ("parameters", "gradients", "optimizer"))
        activations = result.needs.memory.phases["forward and backward"]["activations"]
        other = result.needs.device - states - device.get("activations", 0)
        lines.append(
            f"| {result.model.name} | {result.run.world_size:,} "
            f"| {states / GIB:,.1f} | {activations / GIB:,.1f} | {other / GIB:,.1f} "
            f"| {result.needs.device / GIB:,.1f} | {result.verdict} |"
        )
    return "\n".join([*lines, ""])
