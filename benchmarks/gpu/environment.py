"""Create an environment on top of another Python's torch: `python benchmarks/gpu/environment.py wheels .venv-gpu`.

Run it with the Python that has torch. It needs no network and only the standard library: if that Python has no pip, the wheels
are unpacked. The wheels take precedence over installed packages; all other installed packages remain visible.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


def main() -> int:
    """Create the environment from scratch, and report the packages that are missing."""
    wheels, target = map(Path, sys.argv[1:])
    wheel_paths = sorted(wheels.glob("*.whl"))
    if not wheel_paths:
        sys.stderr.write(f"error: {wheels} holds no wheels. Run `make wheels` on a machine with network, and copy them.\n")
        return 1
    shutil.rmtree(target, ignore_errors=True)
    venv.create(target, system_site_packages=True, with_pip=False, symlinks=True)
    python = target / "bin" / "python"
    site = Path(_run(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    expose_packages(site)
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
    pip += ["--disable-pip-version-check", "--ignore-installed", *map(str, wheel_paths)]
    if subprocess.run(pip, stdin=subprocess.DEVNULL).returncode:
        sys.stderr.write("pip can't install the wheels: unpacking them instead\n")
        for wheel in wheel_paths:
            unpack(wheel, site, target / "bin")
    names = "torch, numpy, pyarrow, pandas, matplotlib, transformers, deepspeed, trl, datasets, pytest"
    missing = _run(python, f"import importlib.util as u; print(*[n for n in '{names}'.split(', ') if u.find_spec(n) is None])")
    print(f"{target}: {len(wheel_paths)} wheels; missing: {missing or 'nothing'}")
    return 0


def expose_packages(site: Path) -> None:
    """Make the packages of the running Python visible in an environment.

    `system_site_packages` is not enough if the running Python is itself a virtual environment: it shows only the packages of
    the Python below that.
    """
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    (site / "_the_torch_below.pth").write_text("\n".join(lines) + "\n")


def unpack(wheel: Path, site: Path, scripts: Path) -> None:
    """Install a wheel without pip: its packages, and the programs among its files (ninja)."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            first, _, rest = name.partition("/")
            if not first.endswith(".data"):
                archive.extract(name, site)
                continue
            kind, _, inner = rest.partition("/")
            if not inner or name.endswith("/") or kind not in ("purelib", "platlib", "scripts"):
                continue
            path = (scripts if kind == "scripts" else site) / inner
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
            if kind == "scripts":
                path.chmod(0o755)


def _run(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
