"""What the checkpoint lacks: tied weights, buffers that are computed, parameters to be initialised.

All of it is the model's own code, run as plain `from_pretrained` runs it: what was loaded is marked, so that `_init_weights`
leaves it alone, and stays on the meta device, where the model's code finds its shape; what is missing stands there whole
while `_init_weights` fills it, on every rank alike, and each rank keeps its range. Where a model writes to what was loaded
nevertheless (plain loading does so, too), that tensor is read whole for the moment. The random numbers come from a fork of
torch's generator, seeded the same on every rank, so the values depend neither on the rank nor on the world size. Nothing
here communicates.
"""

# DeepSpeed hangs its state on parameters as attributes that no stub knows.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from collections.abc import Callable, Iterable, Mapping, Set

import torch
from transformers import PreTrainedModel

from zero_sft.transformers_internals import internal, is_initialized, mark_initialized
from zero_sft.zero import shards
from zero_sft.zero.init_trace import InitStep, trace_init_writes

Load = Callable[[Mapping[str, torch.Tensor]], None]
"""Fills whole flat tensors, by name, from the checkpoint."""


def resolve_ties(tied: Mapping[str, str], loaded: Iterable[str]) -> dict[str, str]:
    """Which names get their values by tying: `{name: the name it will share}`.

    Tying is symmetric, as in plain `from_pretrained`: where the source is missing and the target is there, the source takes
    the target's. Where both were loaded nobody is tied away (they have to be compared first). Where all of a group are
    missing, the targets follow the source, which gets initialised.

    Args:
        tied: `{target: source}`.
        loaded: names that the checkpoint fills.
    """
    loaded = set(loaded)
    away: dict[str, str] = {}
    for target, source in tied.items():
        if target in loaded:
            if source not in loaded and source not in away:
                away[source] = target
        else:
            away[target] = away.get(source, source)
    return away


def initialize_missing(
    model: PreTrainedModel,
    *,
    loaded: Mapping[str, torch.dtype],
    tied: Iterable[str],
    load: Load,
    build_buffers: Callable[[], Mapping[str, torch.Tensor]],
    shard: Callable[[torch.nn.Parameter], None],
    device: torch.device,
    seed: int,
) -> set[str]:
    """Compute the buffers, and initialise what the checkpoint lacks. Every rank; does not communicate.

    The model is whole and on the meta device. Buffers become real; parameters that are initialised become ZeRO parameters
    with their values, one module after the other, so that no more than one module's are whole at a time.

    Args:
        loaded: the parameters and buffers that the checkpoint fills, with their dtypes.
        tied: names that will share another's tensor.
        load: fills whole tensors from the checkpoint.
        build_buffers: the buffers as the model's constructor makes them, for those that no initialisation writes.
        shard: makes one parameter a ZeRO parameter without a shard.
        device: where buffers live.
        seed: the same on every rank.

    Returns:
        The names of loaded parameters that have their values already, since the model's own initialisation changes them.
    """
    tied = set(tied)
    for name in loaded.keys() | tied:
        mark_initialized(model.get_parameter_or_buffer(name))
    params = {name: param for name, param in model.named_parameters() if name not in tied}
    lacking = {name for name, param in params.items() if not is_initialized(param)}
    guard = internal("guard_torch_init_functions")
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.no_grad(), guard():
        steps = trace_init_writes(model)
        last = {name: position for position, step in enumerate(steps) for name in step.writes & params.keys()}
        _give_buffers_memory(model, device, loaded, load)
        _fill_forgotten(model, {*loaded, *(name for step in steps for name in step.writes)}, build_buffers)
        torch.manual_seed(seed)
        for position, step in enumerate(steps):
            if step.writes or step.module._buffers:
                _perform(step, {name: params[name] for name in step.writes & params.keys()}, loaded, load)
            for name in sorted(name for name in step.writes if last.get(name) == position):
                _keep_range(name, params[name], shard)
    for name in sorted(lacking - last.keys()):  # no step gives it values: zeros, rather than whatever was in memory
        shard(params[name])
        shards.fill_shards({name: params[name]}, lambda memory: None)
    for module in model.modules():
        mark_initialized(module)  # as from_pretrained leaves it
    return last.keys() & loaded.keys()


def _fill_forgotten(model: PreTrainedModel, known: Set[str], build_buffers: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Buffers that neither the checkpoint nor a step gives values, as in models written for transformers 4: the constructor's.

    Plain `from_pretrained` leaves in them what was in memory.
    """
    forgotten = {name: buffer for name, buffer in model.named_buffers() if name not in known}
    if forgotten:
        built = build_buffers()
        for name, buffer in forgotten.items():
            buffer.copy_(built[name])


def _perform(step: InitStep, written: Mapping[str, torch.nn.Parameter], loaded: Mapping[str, torch.dtype], load: Load) -> None:
    """Run one step with what it writes, and its module's other parameters, in real memory; the latter go back to meta."""
    for name, param in written.items():
        if param.is_meta:
            shards.move_contents(param, torch.device("cpu"))
            if name in loaded:
                load({name: param.data.view(-1)})
    beside = [param for param in step.module.parameters(recurse=False) if param.is_meta]
    for param in beside:
        shards.move_contents(param, torch.device("cpu"))
    step.run()
    for param in beside:
        shards.move_contents(param, torch.device("meta"))


def _keep_range(name: str, param: torch.nn.Parameter, shard: Callable[[torch.nn.Parameter], None]) -> None:
    """Make an initialised parameter a ZeRO parameter: this rank's range stays, the rest goes."""
    whole = param.data.reshape(-1)
    shard(param)

    def fill(memory: Mapping[str, torch.Tensor]) -> None:
        span = shards.local_range(param)
        memory[name].narrow(0, 0, span.numel).copy_(whole[span.start : span.stop])

    shards.fill_shards({name: param}, fill)


def _give_buffers_memory(model: PreTrainedModel, device: torch.device, loaded: Mapping[str, torch.dtype], load: Load) -> None:
    """Replace buffers on the meta device by real ones: the checkpoint's, or uninitialised ones for `_init_weights` to fill."""
    filled: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            real = torch.empty_like(buffer, device=device, dtype=loaded.get(name, buffer.dtype))
            real.__dict__.update(buffer.__dict__)
            module._buffers[leaf] = real
            if name in loaded:
                filled[name] = real.view(-1)
    if filled:
        load(filled)
