"""The optimizer's state in a ZeRO-3 engine, one parameter at a time: this rank's flat range of master weights and moments.

DeepSpeed concatenates the shards of several parameters, padding included, to one flat tensor per *subgroup*. The optimizer
sees only these flat tensors, so each of its states is flat as well (Adam: `exp_avg`, `exp_avg_sq`), or a number (Adam: `step`).
How parameters are put into subgroups depends on the number of ranks and on the config; what is read and written here does not.

No function here communicates. With the optimizer on NVMe, one subgroup at a time is in memory.
"""

# DeepSpeed's optimizer and its parameters have attributes that type stubs do not declare.
# pyright: reportAttributeAccessIssue=false

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from zero_sft.errors import ExportError
from zero_sft.plan.partition import FlatRange
from zero_sft.zero import shards

Number = int | float | torch.Tensor

MASTER = "master"
"""The key of the weights in the optimizer's precision, if that is not the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterState:
    """This rank's part of the optimizer's state of one parameter.

    Attributes:
        name: the parameter's name in the model.
        flat_range: the elements of this rank.
        tensors: flat tensors of these elements, by key. They share the optimizer's memory.
    """

    name: str
    flat_range: FlatRange
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFormat:
    """The format of the state that an optimizer keeps of a parameter.

    Attributes:
        dtypes: the dtype of each elementwise state, by key; `master` if the model has another dtype.
        numbers: the other values, by key. They are of the parameter's whole subgroup.
    """

    dtypes: Mapping[str, torch.dtype]
    numbers: Mapping[str, Number]


def trained_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that the engine's optimizer trains, by name, in the model's order. Tied ones have one name."""
    trained = {id(param) for group in _zero_optimizer(engine).fp16_groups for param in group}
    return {name: param for name, param in engine.module.named_parameters() if id(param) in trained}


def state_format(engine: Any) -> dict[str, StateFormat]:
    """Return for each trained parameter what the optimizer keeps of it. Before the first step that is `master` at most.

    Raises:
        ExportError: the optimizer keeps a state that is not elementwise, so that no part of it belongs to a parameter.
    """
    optimizer = _zero_optimizer(engine)
    formats: dict[str, StateFormat] = {}
    for flat, on_nvme, params in _subgroups(engine):
        tensors, numbers = _split(optimizer.optimizer, flat, on_nvme)
        dtypes = {key: flat.dtype if on_nvme else tensor.dtype for key, tensor in tensors.items()}
        for name, param in params.items():
            master = {} if param.dtype == flat.dtype else {MASTER: flat.dtype}
            formats[name] = StateFormat(dtypes=dtypes | master, numbers=numbers)
    return {name: formats[name] for name in trained_parameters(engine)}


def parameter_states(engine: Any) -> Iterator[ParameterState]:
    """Yield the state of each trained parameter. Its tensors are valid until the next one is asked for."""
    optimizer = _zero_optimizer(engine)
    for index, (flat, _, params) in enumerate(_subgroups(engine)):
        with _in_memory(optimizer, index):
            tensors, _ = _split(optimizer.optimizer, flat, False)
            for name, param in params.items():
                yield _parameter_state(optimizer, name, param, flat, tensors)


def is_on_nvme(engine: Any) -> bool:
    """Return whether the state is on NVMe, or a part of it."""
    return any(on_nvme for _, on_nvme, _ in _subgroups(engine))


def restore(engine: Any, formats: Mapping[str, StateFormat], fill: Callable[[ParameterState], None]) -> None:
    """Give the optimizer the state that `formats` describes, by parameter.

    Args:
        fill: called for each trained parameter; it writes to the state's tensors.
    """
    optimizer = _zero_optimizer(engine)
    if optimizer.swap_optimizer:
        optimizer.optimizer_swapper.purge_state()  # the files of the state that a new optimizer has
    for index, (flat, _, params) in enumerate(_subgroups(engine)):
        with _in_memory(optimizer, index, write=True):
            # All parameters of a subgroup are of one group of the optimizer: their formats are equal.
            saved = formats[next(iter(params))]
            tensors = {
                key: torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
                for key, dtype in saved.dtypes.items()
                if key != MASTER
            }
            for name, param in params.items():
                fill(_parameter_state(optimizer, name, param, flat, tensors))
            if tensors or saved.numbers:
                group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[index]]
                optimizer.optimizer.state[flat] = tensors | _placed(saved.numbers, group, flat.device)
    if isinstance(optimizer.optimizer, DeepSpeedCPUAdam):
        _count_steps(optimizer.optimizer, max(int(each.numbers.get("step", 0)) for each in formats.values()))


def take_over_weights(engine: Any) -> None:
    """Give the optimizer the model's weights, where it keeps them in the model's dtype. Others are restored as `master`."""
    optimizer = _zero_optimizer(engine)
    for index, (flat, _, params) in enumerate(_subgroups(engine)):
        with _in_memory(optimizer, index, write=True):
            for param in params.values():
                if param.dtype == flat.dtype:
                    _, start, _ = optimizer.grad_position[optimizer.get_param_id(param)]
                    own = shards.local_shard(param)
                    flat.detach().narrow(0, start, own.numel()).copy_(own)


def _count_steps(adam: DeepSpeedCPUAdam, steps: int) -> None:
    """Let DeepSpeed's CPU Adam count up to `steps`, on a tensor of one element.

    It multiplies its bias correction (a power of beta) by beta at each step. A new one would compute the power at once, which
    differs in the last bits.
    """
    group = adam.param_groups[0]
    values = [torch.zeros(1) for _ in range(4)]  # parameter, gradient and moments
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *values
        )


def _zero_optimizer(engine: Any) -> Any:
    """Return DeepSpeed's ZeRO-3 optimizer of an engine."""
    return engine.optimizer


def _subgroups(engine: Any) -> Iterator[tuple[torch.Tensor, bool, dict[str, nn.Parameter]]]:
    """Yield each subgroup's flat master weights, whether they may be on NVMe, and its parameters by name."""
    optimizer = _zero_optimizer(engine)
    names = {id(param): name for name, param in reversed(list(engine.module.named_parameters()))}
    for index, params in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        yield flat, optimizer._swappable_optimizer_subgroup(index), {names[id(param)]: param for param in params}


def _parameter_state(
    optimizer: Any, name: str, param: nn.Parameter, flat: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> ParameterState:
    """Return a parameter's elements in its subgroup's flat tensors, without padding."""
    _, start, _ = optimizer.grad_position[optimizer.get_param_id(param)]
    flat_range = shards.local_range(param)
    parts = {key: tensor.detach().narrow(0, start, flat_range.numel) for key, tensor in tensors.items()}
    if param.dtype != flat.dtype:
        parts[MASTER] = flat.detach().narrow(0, start, flat_range.numel)
    return ParameterState(name=name, flat_range=flat_range, tensors=parts)


def _split(
    inner: torch.optim.Optimizer, flat: torch.Tensor, is_empty: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Number]]:
    """Split a subgroup's state into flat tensors and numbers. With `is_empty`, the tensors' contents are on NVMe now."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Number] = {}
    for key, value in inner.state.get(flat, {}).items():
        if torch.is_tensor(value) and value.dim() == 1 and (is_empty or value.shape == flat.shape):
            tensors[key] = value
        elif isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0):
            numbers[key] = value
        elif value is not None:
            raise ExportError(
                f"the optimizer {type(inner).__name__} keeps a state, {key}, that is not one value per weight, so it can't be "
                "divided among another number of ranks. Give --checkpoint_format deepspeed.",
                code="save.state_not_elementwise",
            )
    return tensors, numbers


def _placed(numbers: Mapping[str, Number], group: Mapping[str, Any], device: torch.device) -> dict[str, Number]:
    """Return the numbers where torch's optimizers expect them: tensors on the host, those of fused ones on the device."""
    on_device = group.get("fused") or group.get("capturable")
    return {
        key: value.to(device if on_device else "cpu") if isinstance(value, torch.Tensor) else value
        for key, value in numbers.items()
    }


@contextlib.contextmanager
def _in_memory(optimizer: Any, index: int, *, write: bool = False) -> Iterator[None]:
    """Keep a subgroup's master weights and state in memory, if they are on NVMe; with `write`, write them back."""
    on_nvme = optimizer._swappable_optimizer_subgroup(index)
    if on_nvme:
        optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if on_nvme and write:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        elif on_nvme:
            optimizer._release_swap_buffers(index)
