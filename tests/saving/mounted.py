"""Run inside `unshare --mount`: `python -m tests.saving.mounted KIND FOLDER` puts models into a target of that kind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.saving import models_on_disk as models
from zero_sft.saving.folder import make_staging, require_writable
from zero_sft.saving.placing import put_in_place


def target(kind: str, folder: Path) -> Path:
    """A folder `out` of the kind: a mount point, a link to another file system, a folder with a mount point inside."""
    out, elsewhere = folder / "out", folder / "elsewhere"
    out.mkdir(parents=True)
    elsewhere.mkdir()
    tmpfs = ["mount", "-t", "tmpfs", "tmpfs"]
    if kind == "tmpfs":
        _run(*tmpfs, out)
    elif kind == "bind mount":
        _run("mount", "--bind", elsewhere, out)
    elif kind == "link":
        _run(*tmpfs, elsewhere)
        out.rmdir()
        out.symlink_to(elsewhere / "deep" / "out")
    elif kind == "mount point inside":
        (out / "data").mkdir()
        _run(*tmpfs, out / "data")
        (out / "data" / "big.bin").write_text("big")
    return out


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def main(kind: str, folder: Path) -> None:
    """Export three times: into the empty target, over a model, over a model in several files."""
    out = target(kind, folder)
    require_writable(out)
    rest: dict[str, str] = {}
    for number, files in ((1, 1), (2, 3), (3, 3)):
        staging = make_staging(out)
        assert os.stat(staging.folder).st_dev == os.stat(out if out.exists() else staging.target.parent).st_dev
        models.write(staging.folder, number, files)
        put_in_place(staging)
        assert models.read(out) == ({number}, {number})
        if not rest:
            models.write_others(out)
            rest = models.others(out)
        assert models.others(out) == rest
        hidden = [path for parent in (out, out.resolve().parent) for path in parent.iterdir() if path.name.startswith(".")]
        assert not hidden, hidden
    sys.stdout.write("placed\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
