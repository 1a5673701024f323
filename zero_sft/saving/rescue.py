"""The end of a run whose output folder can't be written any more: the model is written somewhere else."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError, NotPlacedError, ZeroSftError

logger = logging.getLogger(__name__)


def export_or_rescue(export: Callable[[Path], None], output: Path, world: World) -> None:
    """Export to `output`; where that fails, to a new folder in the working directory. Every rank; communicates.

    Args:
        export: writes the model to a folder, on every rank together.

    Raises:
        ExportError: `output` can't be written; the message says where the model is, if it is anywhere.
    """
    try:
        export(output)
    except NotPlacedError:
        raise
    except ExportError as error:
        token = broadcast_bytes(world, secrets.token_hex(4).encode() if world.is_main else None).decode()
        rescue = Path.cwd() / f"{output.name}-rescued-{token}"
        logger.error("%s\nwriting the model to %s instead", error, rescue)
        try:
            export(rescue)
        except ZeroSftError as second:
            logger.error("%s", second)
            raise error from None
        raise ExportError(f"{error}\nThe trained model is complete in {rescue}.", code=error.code) from error
