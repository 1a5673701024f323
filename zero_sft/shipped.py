"""Where the files that ship with the package are: beside it in an installed wheel, at the top of a checkout."""

from pathlib import Path


def shipped(kind: str, name: str = "") -> Path:
    """The path of the shipped file `name` of `kind` ("ds_configs" or "examples"), or of that folder where `name` is empty."""
    package = Path(__file__).resolve().parent
    folder = package / kind
    if not folder.is_dir():
        folder = package.parent / kind
    return folder / name if name else folder
