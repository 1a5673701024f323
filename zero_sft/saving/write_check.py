"""Rehearse the export at the start of a run: ranks write to a staging folder, which is renamed as at the end."""

import contextlib
import logging
from pathlib import Path

from zero_sft.cluster.stages import collective_stage
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError
from zero_sft.saving.folder import explain_write_errors, find_staging, leftover_stagings, writable_staging

logger = logging.getLogger(__name__)


def check_writing(path: str | Path, world: World) -> None:
    """Make a staging folder for `path`, let one rank of each node write to it, and remove it. Every rank.

    Communicates. Leaves nothing behind except parent folders of `path`.

    Raises:
        ExportError: the folder can't be made or written, or is not visible on every node.
    """
    with contextlib.ExitStack() as stack:
        with collective_stage(world, "checking the output folder") as exchange:
            if world.is_main:
                for leftover in leftover_stagings(path):
                    logger.warning("%s was left by a run that did not end well: move what you need, and remove it", leftover)
                exchange.local = stack.enter_context(writable_staging(path)).reference
        staging = find_staging(path, exchange.gathered[0])
        with collective_stage(world, "writing to the output folder"), explain_write_errors(path):
            if world.leads_node:
                if not staging.folder.is_dir():
                    raise ExportError(
                        f"--output_dir {path} is not the same folder on all nodes: rank {world.rank} does not see what rank 0 "
                        "wrote there. Name a folder on a file system that all nodes share.",
                        code="export.folder_not_shared",
                    )
                (staging.folder / f"rank-{world.rank}").write_bytes(b"0")
