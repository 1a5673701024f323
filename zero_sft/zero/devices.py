"""The device of each rank. DeepSpeed uses the device whose number is the local rank."""

from typing import Any

from deepspeed.accelerator import get_accelerator

from zero_sft.cluster.world import World
from zero_sft.errors import ConfigError, Scope


def require_own_device(world: World) -> None:
    """Check that this rank sees a device whose number is its local rank. Every rank; does not communicate.

    Raises:
        ConfigError: the rank sees too few devices. Only the first such rank of each node reports it.
    """
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        return
    count = accelerator.device_count()
    if world.local_rank < count:
        return
    raise ConfigError(
        f"rank {world.rank} has local rank {world.local_rank}, but sees {count} device{'s' * (count != 1)}. Start as many "
        "ranks on a node as it has devices, and let every rank see all of them: under SLURM, ask for --gpus-per-node, not for "
        "--gpus-per-task or --gpu-bind, and don't set CUDA_VISIBLE_DEVICES for each rank.",
        code="cluster.rank_without_device",
        scope=Scope.THIS_RANK if world.local_rank == count else Scope.UNKNOWN,
    )
