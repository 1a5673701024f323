"""Export a checkpoint to a model folder, or the mean of several.

python -m zero_sft.export runs/my-run/checkpoint-500 my-model
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zero_sft.arguments.specifications import shared_options, shared_translations
from zero_sft.checkpoint.folder_kind import ADAPTER_CONFIG
from zero_sft.cluster.world import World
from zero_sft.console.log import close_console, open_console, silence_transformers
from zero_sft.errors import ArgumentError
from zero_sft.options.command import Command
from zero_sft.options.keywords import pick_options
from zero_sft.options.spec import emptiness_errors, specs_of
from zero_sft.printable import excerpt, first_of

logger = logging.getLogger("zero_sft.export")

_HUB = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "subfolder")
_LAST = re.compile(r"last:(\d{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportArguments:
    """Options of the export."""

    checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the checkpoint: of this project, of DeepSpeed (ZeRO-3), or universal. Of a run's folder, the "
            "newest complete checkpoint."
        },
    )
    out: str | None = field(default=None, metadata={"help": "Folder for the model; weights in it are replaced."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Merge this adapter, a folder of PEFT or of this project, into its base model; in place of CHECKPOINT."
        },
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "If CHECKPOINT is an adapter's, write its base model with the adapter merged."}
    )
    average: str | None = field(
        default=None,
        metadata={"help": "Export the mean of a run's checkpoints: last:3, or names such as checkpoint-2,checkpoint-4."},
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "dtype of the weights; by default, that in which the run trained. float32: the master weights."},
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "Upload the model with a card to this repository of the hub (org/model). HF_TOKEN must allow it."},
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make the repository private, if it does not exist."})
    verify: bool = field(
        default=True, metadata={"help": "Compare the files with the checkpoint's manifest first, which reads them once more."}
    )


def command() -> Command:
    """Return the command and its options."""
    model = shared_options(
        ["model_name_or_path"],
        default=None,
        help="A folder or a hub id with the model's config and tokenizer, for a checkpoint without them; an adapter's base.",
    )
    hub = shared_options(_HUB)
    return Command(
        program="python -m zero_sft.export",
        description="Export a checkpoint to a model folder, in one process, with one tensor in memory at a time.",
        groups={"Checkpoint and output": list(specs_of(ExportArguments).values()), "Model": [*model, *hub]},
        translations=shared_translations([*model, *hub]),
        positional=("checkpoint", "out"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return command().run(argv, _export)


def _export(options: Any, notes: Sequence[str]) -> None:
    import torch

    from zero_sft.export.convert import ExportRequest, export
    from zero_sft.hub.options import HubOptions
    from zero_sft.hub.upload import make_repository, upload
    from zero_sft.saving.model_card import files_of_model
    from zero_sft.saving.trainer_checkpoint import require_no_checkpoint

    open_console(World.alone())
    silence_transformers(World.alone())
    for note in notes:
        logger.info(note)
    folder, out, merges = _folders(options)
    checkpoints = _checkpoints(folder, options.average)
    if any(out.resolve() == each.resolve() for each in (*checkpoints, folder)):
        raise ArgumentError(
            f"{out} is the checkpoint's folder, whose files would be replaced. Name another folder.",
            code="export.into_the_checkpoint",
        )
    require_no_checkpoint(out, "Name another folder.")
    repository = (
        make_repository(options.push_to_hub, private=options.hub_private_repo or None, token=options.token)
        if options.push_to_hub
        else None
    )
    names = first_of([str(each) for each in checkpoints])
    logger.info("exporting %s%s", f"the mean of {len(checkpoints)} checkpoints: " * (len(checkpoints) > 1), names)
    try:
        export(
            ExportRequest(
                checkpoints=checkpoints,
                out=out,
                model=options.model_name_or_path,
                hub=pick_options(HubOptions, options),
                merge_adapter=merges,
                dtype=None if options.save_dtype is None else getattr(torch, options.save_dtype),
                verify=options.verify,
            )
        )
    finally:
        close_console()
    is_adapter = not (out / "config.json").exists()
    logger.info("%s: %s", "adapter, to be merged with --merge_adapter True" if is_adapter else "model", out)
    if repository is not None:
        _add_card(out, checkpoints[-1], repository.rpartition("/")[2])
        logger.info(
            "uploaded: %s", upload(out, repository, f"Export {checkpoints[-1].name}", files_of_model(out), options.token)
        )


def _folders(options: Any) -> tuple[Path, Path, bool]:
    """Return the checkpoint's folder, that of the model, and whether an adapter is merged.

    Raises:
        ArgumentError: one is not named, or there are two checkpoints.
    """
    checkpoint, out = options.checkpoint, options.out
    if options.adapter is not None:
        if out is None:  # the first name without an option
            checkpoint, out = None, checkpoint
        if checkpoint is not None:
            raise ArgumentError(
                f"--adapter {options.adapter} stands in place of the checkpoint {checkpoint}: name one of the two.",
                code="arguments.contradiction",
            )
        checkpoint = options.adapter
    missing = [
        ArgumentError(f"--{name} is required: give {what}", code="arguments.required")
        for name, value, what in (
            ("checkpoint", checkpoint, "the folder of a checkpoint, such as runs/my-run/checkpoint-500"),
            ("out", out, "the folder for the model"),
        )
        if value is None
    ]
    empty = emptiness_errors({"checkpoint": checkpoint, "out": out}, ("checkpoint", "out"))
    if problems := [*missing, *empty]:
        raise ArgumentError.listing(problems, "the arguments can't be used:", code="arguments.unusable")
    return Path(checkpoint).expanduser(), Path(out).expanduser(), options.merge_adapter or options.adapter is not None


def _add_card(out: Path, checkpoint: Path, name: str) -> None:
    """Write the card, from what the checkpoint says of its run; none without its record."""
    from zero_sft.checkpoint.manifest import has_manifest, read_manifest
    from zero_sft.checkpoint.run_state import read_trainer_state
    from zero_sft.saving.folder import explain_write_errors
    from zero_sft.saving.model_card import add_card
    from zero_sft.saving.run_record import read_record

    record = read_record(checkpoint)
    if record is None:
        logger.warning("%s does not say what run it is of: no card is written", checkpoint)
        return
    history = read_trainer_state(checkpoint).get("log_history", [])
    ranks = read_manifest(checkpoint).world_size if has_manifest(checkpoint) else None
    with explain_write_errors(out):
        add_card(out, name, record, history, ranks, None)


def _checkpoints(folder: Path, average: str | None) -> list[Path]:
    """Return the checkpoints to export.

    Raises:
        ArgumentError: one does not exist or is not complete, or there are not as many.
    """
    from zero_sft.saving.checkpoint_folders import newest_first
    from zero_sft.saving.trainer_checkpoint import IncompleteCheckpointError, has_states, inspect_checkpoint

    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}. Name the folder of a checkpoint.", code="export.no_checkpoint")
    in_run = newest_first(folder)
    is_complete = has_states(folder) or (folder / ADAPTER_CONFIG).is_file()
    if average is None and (is_complete or not in_run):
        return [folder]
    complete: list[Path] = []
    names = None if average is None or _LAST.fullmatch(average) else _names(average, folder)
    for path in [folder / name for name in names] if names else in_run:
        try:
            inspect_checkpoint(path)
        except OSError as error:  # a name that is too long
            raise ArgumentError(
                f"--average {average!s:.100} names no checkpoint of {folder}: {error.strerror}. Expected last:N, or names of "
                "checkpoints.",
                code="export.no_checkpoint",
            ) from error
        except IncompleteCheckpointError as error:
            if names:
                raise ArgumentError(
                    f"--average {average}: {path} can't be used: {error}. Expected last:N, or checkpoints of {folder}.",
                    code=error.code,
                ) from error
            logger.warning("%s is passed over, since it is not complete: %s", path, error)
        else:
            complete.append(path)
    if average is None and not complete:
        raise ArgumentError(f"{folder} has no complete checkpoint.", code="export.no_checkpoint")
    count = 1 if average is None else len(names) if names else int(average.removeprefix("last:"))
    if count < 1 or len(complete) < count:
        if not complete and has_states(folder):
            raise ArgumentError(
                f"{folder} is a checkpoint; --average takes several of one run. Name the run's folder, {folder.parent}.",
                code="export.no_checkpoint",
            )
        raise ArgumentError(
            f"{folder} has {len(complete)} complete checkpoints, and {count} are asked for. Give --average last:N with a "
            "number from 1 to that.",
            code="export.no_checkpoint",
        )
    return complete if names else complete[:count][::-1]


def _names(average: str, folder: Path) -> list[str]:
    """Split the names of checkpoints.

    Raises:
        ArgumentError: one is empty, is there twice, or is not in the run's folder.
    """
    names = [name.strip() for name in average.split(",")]
    bad = next((name for name in names if not name or Path(name).name != name or names.count(name) > 1), None)
    if bad is not None:
        reason = "is there twice" if names.count(bad) > 1 and bad else "does not name a folder in it"
        raise ArgumentError(
            f"--average {average!s:.100}: {excerpt(repr(bad))} {reason}. Expected last:N, or names of checkpoints of {folder}.",
            code="export.bad_average",
        )
    return names
