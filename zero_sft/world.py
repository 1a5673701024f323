"""Who is who: plain data, detected once from a launcher's variables and passed in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zero_sft import errors


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among its peers: `0 <= rank < world_size`, `0 <= local_rank < local_world_size` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that talks to the person."""
        return self.rank == 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "World":
        """Read the launcher's variables: torchrun's and DeepSpeed's first, then those of a SLURM step, else one process.

        Raises:
            ConfigError: variables that are not numbers or contradict each other.
        """
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "").isdigit():
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        else:
            return cls()
        return cls._from_variables(env, names)

    @classmethod
    def _from_variables(cls, env: Mapping[str, str], names: tuple[str, str, str, str]) -> "World":
        try:
            rank, world_size = int(env[names[0]]), int(env[names[1]])
            local_rank = int(env.get(names[2], "0"))
            local = env.get(names[3], "")
            # SLURM writes "2(x3),1": the tasks of each node. Uneven nodes are rare; the first count serves as the size.
            local_world_size = int(local.split("(")[0].split(",")[0]) if local else local_rank + 1
        except (KeyError, ValueError) as error:
            raise errors.ConfigError(
                f"the launcher's variables are not usable ({error}): expected numbers in {', '.join(names)}, got "
                f"{ {name: env.get(name) for name in names} }. Start the job with ./launch.sh, deepspeed, torchrun or srun."
            ) from error
        if not 0 <= rank < world_size:
            raise errors.ConfigError(
                f"{names[0]}={rank} is not below {names[1]}={world_size}. Start the job with ./launch.sh or a launcher."
            )
        return cls(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)
