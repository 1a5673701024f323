"""Can a run go on from a checkpoint of the trainer's? Asked before the weights are read."""

import re
from pathlib import Path

from zero_sft.errors import ArgumentError

_OPTIMIZER_STATE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")


def require_resumable(wanted: str | bool | None, output_dir: str | Path, world_size: int) -> None:
    """Check `--resume_from_checkpoint`: a folder, or True for the last one in `output_dir`.

    Raises:
        ArgumentError: no checkpoint there, none of DeepSpeed's, or one that another number of ranks has written.
    """
    if wanted is None or wanted is False:
        return
    folder = _last(Path(output_dir)) if wanted is True else Path(wanted)
    if folder is None or not folder.is_dir():
        place = f"no checkpoint-* folder in {output_dir}" if folder is None else f"no folder {folder}"
        raise ArgumentError(f"--resume_from_checkpoint {wanted}: {place}. Leave it out to start anew.")
    ranks = {int(found[2]) for path in folder.glob("global_step*/*") if (found := _OPTIMIZER_STATE.fullmatch(path.name))}
    if not ranks:
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: {folder} holds no state of DeepSpeed's. Name a checkpoint-* folder that this "
            "job has written (without --save_only_model), or start anew from its weights: --model_name_or_path."
        )
    if len(ranks) != world_size:
        raise ArgumentError(
            f"--resume_from_checkpoint {wanted}: {folder} was written by {len(ranks)} ranks, and here are {world_size}; ZeRO's "
            "state is cut for their number. Start as many ranks."
        )


def _last(folder: Path) -> Path | None:
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else Path(found)
