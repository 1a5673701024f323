"""Fill a folder with the wheels that a machine without a network needs in addition to torch: `make wheels`.

The wheels are for Python 3.12 on x86-64 Linux, in the versions of `constraints.txt`. DeepSpeed publishes only sources; this
script builds its wheel without operators, so that it is pure Python. Left out are large packages that most images with torch
contain: numpy, pyarrow and pandas, which `datasets` and therefore TRL import, and matplotlib, which draws the loss curve.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

LIMIT_MIB = 64
PYTHON = "3.12"

PACKAGES = """
    accelerate annotated-doc annotated-types anyio certifi charset-normalizer click datasets dill einops filelock
    fsspec h11 hf-xet hjson httpcore2 httpx2 huggingface_hub idna iniconfig Jinja2 markdown-it-py MarkupSafe mdurl
    msgpack multiprocess ninja packaging pluggy protobuf psutil py-cpuinfo pydantic pydantic_core Pygments pytest
    pytest-timeout python-dateutil PyYAML regex requests rich safetensors sentencepiece shellingham tokenizers
    tqdm transformers trl truststore typer typing-inspection typing_extensions tzdata urllib3 xxhash
""".split()  # noqa: SIM905 - a table
"""The packages that the job and its tests import, and their dependencies."""

_GLIBC = (34, 31, 28, 27, 26, 24, 17, 12, 5)
_OLD_NAMES = ("manylinux2014", "manylinux2010", "manylinux1")


def main() -> int:
    """Download and build the wheels, and print their sizes. Return 1 if they exceed the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("wheels"))
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--limit_mib", type=float, default=LIMIT_MIB, help=f"limit of the total size (default {LIMIT_MIB})")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    for old_wheel in options.folder.glob("*.whl"):
        old_wheel.unlink()
    pinned = pins(options.constraints)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + [f"{name}_x86_64" for name in _OLD_NAMES]
    command = ["download", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    _pip([*command, "--dest", str(options.folder), *(pinned[_normalise(name)] for name in PACKAGES)])
    build = ["wheel", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(options.folder), pinned["deepspeed"]]
    _pip(build, DS_BUILD_OPS="0", DS_ACCELERATOR="cpu")
    sizes = {path.name: path.stat().st_size for path in options.folder.glob("*.whl")}
    for name, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{nbytes / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:8.2f} MiB  in total, {len(sizes)} wheels; the limit is {options.limit_mib:g} MiB")
    return int(total > options.limit_mib)


def pins(constraints: Path) -> dict[str, str]:
    """Return `name==version` for each package, by its normalised name."""
    lines = (line.strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    return {_normalise(line.split("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}


def _normalise(name: str) -> str:
    return name.lower().replace("_", "-")


def _pip(arguments: list[str], **variables: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--no-deps", *arguments[1:]]
    subprocess.run(command, check=True, env=os.environ | variables)


if __name__ == "__main__":
    sys.exit(main())
