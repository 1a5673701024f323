"""Write a trained model as a plain Hugging Face checkpoint, without a gather: a load in reverse.

Every rank computes the same layout, with the names and shapes of plain `save_pretrained`: experts one by one, as they were
published. Rank 0 writes the headers, config and tokenizer. Every rank plans the load of its shards from these files, and writes
the bytes that it would read. All files are written to a hidden staging folder (`folder.py`), which takes the target's place at
the end (`placing.py`): a job that dies meanwhile leaves the target as it was.
"""

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from zero_sft.checkpoint.file_layout import MAX_FILE_BYTES
from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.stages import collective_stage, timeout_for_bytes
from zero_sft.cluster.world import World
from zero_sft.console import progress
from zero_sft.errors import ArgumentError, ExportError, NotPlacedError, ZeroSftError
from zero_sft.options.keywords import require_instance, require_path, wrong_value
from zero_sft.saving import weight_files
from zero_sft.saving.export_layout import ExportLayout, on_meta
from zero_sft.saving.folder import explain_not_placed, explain_write_errors, find_staging, make_staging
from zero_sft.saving.forms import MergedModel, SavedForm, form_of
from zero_sft.saving.gathered_parts import write_gathered
from zero_sft.saving.placing import put_in_place, require_replaceable
from zero_sft.saving.readable import is_adapted, unwrapped
from zero_sft.storage.default_device import cpu_by_default
from zero_sft.zero.process_group import connect

logger = logging.getLogger(__name__)


@cpu_by_default()
def save_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    merge_adapter: bool = False,
) -> None:
    """Write `model` (a loaded model, or a DeepSpeed engine around one) to the folder `path`. Every rank; communicates.

    Of a model that PEFT wraps, the adapter is written. If not all ranks see `path` on one file system, rank 0 writes all.
    Weights in the folder are replaced; its other files stay.

    Args:
        merge_adapter: write a complete model instead, with the adapter merged. It is merged in place, into the shards: a
            training of it can't go on.

    Raises:
        ExportError: the folder can't be written, or the export would not load as this model.
        ArgumentError: an argument has another type or is out of range.
    """
    world = connect(World.detect())
    with collective_stage(world, "checking the model"):
        if path == "":  # as a path, it would be the working directory
            raise ExportError(
                "the folder to save the model to is empty: check that its variable is set.", code="export.no_folder_named"
            )
        target = Path(require_path("path", path, "text or a path: the folder to write to")).expanduser()
        require_instance("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer of transformers, or None")
        if type(max_file_bytes) is not int or max_file_bytes < 1:
            raise wrong_value("max_file_bytes", max_file_bytes, "a whole number of bytes, at least 1")
        saved = unwrapped(model)
        if merge_adapter and not is_adapted(saved):
            raise ArgumentError(
                "merge_adapter=True needs a model with an adapter, as PEFT makes it: leave it out.", code="arguments.no_effect"
            )
        form = form_of(saved)
    if merge_adapter:
        from zero_sft.adapters.merge import merge  # PEFT, which other models do not need

        merge(saved, world)
        form = MergedModel(saved)
    save_form(form, target, tokenizer, world, max_file_bytes=max_file_bytes)


def save_form(
    form: SavedForm,
    target: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    world: World,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model in one of its forms to a folder, as `save_pretrained` does. Every rank; communicates."""
    with collective_stage(world, "listing the weights"):
        tensors = form.tensors()
        state = on_meta(tensors)
        if world.is_main:
            form.require_loads_back(state)
    layout = form.choose_layout(state, max_file_bytes, world)
    with contextlib.ExitStack() as cleanup:
        with collective_stage(world, f"making a staging folder for {target}") as exchange, explain_write_errors(target):
            exchange.must_match = ("files of the export", {"layout": layout.digest()})
            if world.is_main:
                staging = make_staging(target)
                cleanup.callback(shutil.rmtree, staging.folder, ignore_errors=True)
                exchange.local = staging.reference
        staging = find_staging(target, exchange.gathered[0])
        with collective_stage(world, f"preparing {target}"), explain_write_errors(target):
            if world.is_main:
                weight_files.write_headers(staging.folder, layout.files)
                for name, content in weight_files.index_file(layout.files).items():
                    (staging.folder / name).write_bytes(content)
                form.write_settings(staging.folder, tokenizer)
                require_replaceable(staging.target, {path.name for path in staging.folder.iterdir()})
        with collective_stage(world, f"looking for {staging.folder.name}") as exchange:
            exchange.local = staging.folder.is_dir()
        _write_weights(staging.folder, target, layout, tensors, world, is_shared=all(exchange.gathered))
        cleanup.pop_all()  # a complete export that can't take its place is kept
    with collective_stage(world, f"finishing {target}"), explain_not_placed(staging):
        if world.is_main:
            put_in_place(staging)


def _write_weights(
    folder: Path, target: Path, layout: ExportLayout, tensors: Mapping[str, Any], world: World, *, is_shared: bool
) -> None:
    """Write the weights into files that have their headers. Every rank; communicates."""
    if is_shared:
        total = weight_files.part_nbytes(tensors, is_main=world.is_main)
        with (
            collective_stage(world, f"writing {target}", timeout_for_bytes(layout.nbytes)),
            explain_write_errors(target),
            progress.task("writing the model", total, progress.BYTES) as task,
        ):
            parts = weight_files.weight_parts(tensors, is_main=world.is_main)
            weight_files.write_parts(folder, layout.files, layout.source_maps, parts, advance=task.advance)
        return
    if world.is_main:
        logger.info("not all ranks see %s: rank 0 writes the whole model", target)
    with progress.task("writing the model", layout.nbytes, progress.BYTES) as task:
        write_gathered(folder, target, layout.files, layout.source_maps, tensors, world, task.advance)


def export_or_rescue(export: Callable[[Path], None], output: Path, world: World) -> None:
    """Export to `output`; if that fails, to a new folder in the working directory. Every rank; communicates.

    Args:
        export: writes the model to a folder; called on every rank.

    Raises:
        ExportError: `output` can't be written; the message names the folder that holds the model, if one does.
    """
    try:
        export(output)
    except NotPlacedError:
        raise
    except ExportError as error:
        token = broadcast_bytes(world, secrets.token_hex(4).encode() if world.is_main else None).decode()
        rescue = Path.cwd() / f"{output.name}-rescued-{token}"
        if world.is_main:
            logger.warning("%s\nwriting the model to %s instead", error, rescue)
        try:
            export(rescue)
        except ZeroSftError as rescue_error:
            if world.is_main:
                logger.warning("%s", rescue_error)
            raise error from None
        raise ExportError(f"{error}\nThe trained model is complete in {rescue}.", code=error.code) from error
