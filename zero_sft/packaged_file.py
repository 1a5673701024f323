"""Locate the files that ship with the package: in the package if it is installed, at the top of a checkout otherwise."""

from pathlib import Path


def packaged_file(kind: str, name: str = "") -> Path:
    """Return the path of a shipped file in the folder `kind` ("ds_configs" or "examples"), or of that folder without `name`."""
    package = Path(__file__).resolve().parent
    folder = package / kind
    if not folder.is_dir():
        folder = package.parent / kind
    return folder / name
