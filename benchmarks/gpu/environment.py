"""An environment on top of another Python's torch: `python benchmarks/gpu/environment.py wheels .venv-gpu`.

Run with the Python that has torch. It needs no network and nothing but the standard library: where that Python has no pip, the
wheels are unpacked. What the folder holds goes before what is there; all the rest is seen through.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


def main() -> int:
    """Make the environment anew, and try to import what matters."""
    wheels, target = (Path(each) for each in sys.argv[1:])
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.stderr.write(
            f"error: {wheels} holds no wheels. Run `make wheels` where there is a network, and bring the folder.\n"
        )
        return 1
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, system_site_packages=True, with_pip=False, symlinks=True)
    python = target / "bin" / "python"
    site = Path(_run(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    see_through(site)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
    ]
    pip += ["--disable-pip-version-check", "--ignore-installed", *map(str, found)]
    if subprocess.run(pip, stdin=subprocess.DEVNULL).returncode:
        sys.stderr.write("pip did not install the wheels; unpacking them\n")
        for wheel in found:
            unpack(wheel, site, target / "bin")
    names = "torch, numpy, pyarrow, pandas, matplotlib, transformers, deepspeed, trl, datasets, pytest"
    missing = _run(python, f"import importlib.util as u; print(*[n for n in '{names}'.split(', ') if u.find_spec(n) is None])")
    print(f"{target}: {len(found)} wheels; missing: {missing or 'nothing'}")
    return 0


def see_through(site: Path) -> None:
    """Let an environment see the packages of the Python that runs this.

    `system_site_packages` is not enough where that Python is an environment itself: it leads to the one below.
    """
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    (site / "_the_torch_below.pth").write_text("\n".join(lines) + "\n")


def unpack(wheel: Path, site: Path, scripts: Path) -> None:
    """Install a wheel by hand: its packages, and the programs that it brings as files (ninja)."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            first, _, rest = name.partition("/")
            if not first.endswith(".data"):
                archive.extract(name, site)
                continue
            kind, _, inner = rest.partition("/")
            if not inner or name.endswith("/") or kind not in ("purelib", "platlib", "scripts"):
                continue
            place = (scripts if kind == "scripts" else site) / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.read(name))
            if kind == "scripts":
                place.chmod(0o755)


def _run(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
