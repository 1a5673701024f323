"""Initialise the tensors that the checkpoint lacks: computed buffers and new parameters.

The model's code runs as in plain `from_pretrained`. Stored and tied tensors are marked as initialised, so `_init_weights` skips
them. They stay on the meta device, where the code can read their shapes. Each missing parameter is materialised in full on
every rank, `_init_weights` fills it, and each rank keeps its range.
Some models write to stored tensors nevertheless, in plain loading as well. Such a tensor is read in full for that step.
The random numbers come from a fork of torch's generator with the same seed on every rank, so the values depend neither on the
rank nor on the world size. Nothing here communicates.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set

import torch
from transformers import PreTrainedModel

from zero_sft.transformers_internals import initialize_module, internal, is_initialized, mark_initialized
from zero_sft.zero import shards
from zero_sft.zero.init_trace import InitStep, trace_init_writes

Load = Callable[[Mapping[str, torch.Tensor]], None]
"""Fill full flat tensors, by name, from the checkpoint."""


def resolve_ties(tied: Mapping[str, str], filled_names: Iterable[str]) -> dict[str, str]:
    """Find the names that get their values by tying: `{name: the name whose tensor it shares}`.

    Tying is symmetric, as in plain `from_pretrained`:

    - Only one of the pair is filled: the other one shares its tensor.
    - Both are filled: neither is in the result, because their values have to be compared first.
    - All tensors of a group are missing: the targets share the source's tensor, which is initialised.

    Args:
        tied: `{target: source}`.
        filled_names: the names that the checkpoint fills.
    """
    filled = set(filled_names)
    tied_to: dict[str, str] = {}
    for target, source in tied.items():
        if target in filled:
            if source not in filled and source not in tied_to:
                tied_to[source] = target
        else:
            tied_to[target] = tied_to.get(source, source)
    return tied_to


def initialize_missing(
    model: PreTrainedModel,
    *,
    stored_dtypes: Mapping[str, torch.dtype],
    tied: Iterable[str],
    load: Load,
    build_buffers: Callable[[], Mapping[str, torch.Tensor]],
    make_zero_parameter: Callable[[torch.nn.Parameter], None],
    device: torch.device,
    seed: int,
) -> set[str]:
    """Compute the buffers and initialise the parameters that the checkpoint lacks. Every rank; does not communicate.

    The model must be unpartitioned and on the meta device. Buffers get memory and values. Initialised parameters become ZeRO
    parameters with their values, module by module, so that the full parameters of only one module exist at once.

    Args:
        stored_dtypes: the dtypes of the parameters and buffers that the checkpoint fills, by name.
        tied: the names that will share another name's tensor.
        load: fills full tensors from the checkpoint.
        build_buffers: returns the buffers as the model's constructor makes them, for those that no initialisation writes.
        make_zero_parameter: turns one parameter into a ZeRO parameter with an empty shard.
        device: the device of the buffers.
        seed: the random seed, the same on every rank.

    Returns:
        The names of stored parameters that already have their final values, because the model's initialisation changes them.
    """
    tied = set(tied)
    for name in stored_dtypes.keys() | tied:
        mark_initialized(model.get_parameter_or_buffer(name))
    params = {name: param for name, param in model.named_parameters() if name not in tied}
    missing = {name for name, param in params.items() if not is_initialized(param)}
    guard = internal("guard_torch_init_functions")
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), torch.no_grad(), guard():
        steps = trace_init_writes(model)
        _materialize_buffers(model, device, stored_dtypes, load)
        _fill_unwritten_buffers(model, {*stored_dtypes, *(name for step in steps for name in step.writes)}, build_buffers)
        torch.manual_seed(seed)
        written = _run_steps(steps, params, stored_dtypes, load, make_zero_parameter)
    for name in sorted(missing - written):  # no step writes it: zeros instead of uninitialised memory
        make_zero_parameter(params[name])
        shards.fill_shards({name: params[name]}, lambda memory: None)
    for module in model.modules():
        mark_initialized(module)  # as from_pretrained leaves it
    return written & stored_dtypes.keys()


def _fill_unwritten_buffers(
    model: PreTrainedModel, written: Set[str], build_buffers: Callable[[], Mapping[str, torch.Tensor]]
) -> None:
    """Fill the buffers that neither the checkpoint nor a step writes with the constructor's values.

    Models written for transformers 4 have such buffers. Plain `from_pretrained` leaves them uninitialised.
    """
    unwritten = {name: buffer for name, buffer in model.named_buffers() if name not in written}
    if unwritten:
        constructed = build_buffers()
        for name, buffer in unwritten.items():
            buffer.copy_(constructed[name])


def _run_steps(
    steps: Sequence[InitStep],
    params: Mapping[str, torch.nn.Parameter],
    stored_names: Container[str],
    load: Load,
    make_zero_parameter: Callable[[torch.nn.Parameter], None],
) -> set[str]:
    """Run the steps in order. Partition each parameter after the last step that writes it; return the names of these."""
    last_write = {name: position for position, step in enumerate(steps) for name in step.writes & params.keys()}
    for position, step in enumerate(steps):
        if step.writes or step.module._buffers:  # a step may also replace a buffer, which the trace does not see
            _run_one_step(step, {name: params[name] for name in step.writes & params.keys()}, stored_names, load)
        for name in sorted(name for name in step.writes if last_write.get(name) == position):
            _keep_local_range(name, params[name], make_zero_parameter)
    return set(last_write)


def _run_one_step(step: InitStep, to_write: Mapping[str, torch.nn.Parameter], stored_names: Container[str], load: Load) -> None:
    """Run one step with real memory for the parameters that it writes and, until it ends, for its module's other ones."""
    for name, param in to_write.items():
        if param.is_meta:
            shards.move_contents(param, torch.device("cpu"))
            if name in stored_names:
                load({name: param.data.view(-1)})
    unwritten = [param for param in step.module.parameters(recurse=False) if param.is_meta]
    for param in unwritten:
        shards.move_contents(param, torch.device("cpu"))
    initialize_module(step.owner, step.module)
    for param in unwritten:
        shards.move_contents(param, torch.device("meta"))


def _keep_local_range(name: str, param: torch.nn.Parameter, make_zero_parameter: Callable[[torch.nn.Parameter], None]) -> None:
    """Turn an initialised parameter into a ZeRO parameter that keeps this rank's range of the values."""
    full = param.data.reshape(-1)
    make_zero_parameter(param)

    def copy_local_range(memory: Mapping[str, torch.Tensor]) -> None:
        flat_range = shards.local_range(param)
        memory[name].narrow(0, 0, flat_range.numel).copy_(full[flat_range.start : flat_range.stop])

    shards.fill_shards({name: param}, copy_local_range)


def _materialize_buffers(
    model: PreTrainedModel, device: torch.device, stored_dtypes: Mapping[str, torch.dtype], load: Load
) -> None:
    """Give meta buffers memory on `device`, and load those that the checkpoint has. `_init_weights` fills the others."""
    to_load: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            real = torch.empty_like(buffer, device=device, dtype=stored_dtypes.get(name, buffer.dtype))
            vars(real).update(vars(buffer))
            module._buffers[leaf] = real
            if name in stored_dtypes:
                to_load[name] = real.view(-1)
    if to_load:
        load(to_load)
