"""Questions about paths that several folders of the package ask."""

from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists: where it would be made.

    Raises:
        OSError: it can't be reached.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
