"""Save the trained model somewhere else if the output folder can no longer be written."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from zero_sft.cluster.control_group import broadcast_bytes
from zero_sft.cluster.world import World
from zero_sft.errors import ExportError, NotPlacedError, ZeroSftError

logger = logging.getLogger(__name__)


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
        logger.error("%s\nwriting the model to %s instead", error, rescue)
        try:
            export(rescue)
        except ZeroSftError as rescue_error:
            logger.error("%s", rescue_error)
            raise error from None
        raise ExportError(f"{error}\nThe trained model is complete in {rescue}.", code=error.code) from error
