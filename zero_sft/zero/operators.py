"""DeepSpeed's operators: compiled at first use into a folder of this project, under a lock that dies with its process.

torch marks a build under way by a file `lock`, and waits for it to go away, silently and without end. A process that is
killed meanwhile leaves it there, and every later run on the machine hangs. Environments that share torch's folder also undo
each other's builds, since the paths of the sources differ.

Here each operator is compiled in a fresh folder, which is then renamed; a folder with its final name is complete. One
process on the file system compiles, under `flock`, which the kernel releases when the process ends, however it ends. The
others wait, and then import what is there without asking the compiler again. A killed build costs another build.

An operator that no part of a run asks for is not looked at.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_BUILDS = "building-"
"""The folders of builds under way, and of killed ones, begin so."""

# fmt: off
_LOCAL_FILE_SYSTEMS = frozenset([
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "overlayfs", "aufs", "jfs", "9p", "virtiofs",
])
# fmt: on
_COMPILERS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDA_HOME", "ROCM_HOME", "DS_ENABLE_NINJA")


def prefer_own_ninja() -> None:
    """Put this environment's folder of programs before the others of PATH. Does not communicate.

    torch compiles with the first ninja there.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if (Path(own) / "ninja").exists() and path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join(filter(None, (own, path)))


def keep_operators_apart() -> None:
    """Let DeepSpeed compile and find its operators as this module says, for the rest of the process. Does not communicate.

    Call it before DeepSpeed joins the ranks: its CPU backend loads an operator then. Later calls change nothing.
    """
    from zero_sft.zero.internals import operator_builder

    builder = operator_builder()
    original = builder.jit_load
    if getattr(original, "compiles_apart", False):
        return

    @functools.wraps(original)
    def jit_load(self: Any, verbose: bool = True) -> Any:
        return _load(self, original, verbose)

    setattr(jit_load, "compiles_apart", True)  # noqa: B010 - no attribute of a function that a stub knows
    builder.jit_load = jit_load
    prefer_own_ninja()


def operators_folder() -> Path:
    """The folder that holds the operators of this environment on this kind of machine; made if need be.

    It lies in `TORCH_EXTENSIONS_DIR` where that is set, else in the user's cache. On a network file system each host has one,
    since `flock` may not reach other hosts there.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cache_home() / "zero_sft" / "operators").expanduser()
    try:
        folder = root / _environment(network=_file_system(root) not in _LOCAL_FILE_SYSTEMS)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        folder = Path(tempfile.gettempdir()) / f"zero_sft-{os.getuid()}" / _environment(network=False)
        logger.debug("%s can't be written (%s); DeepSpeed's operators go to %s", root, error, folder)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def _environment(network: bool) -> str:
    """A name for all that a compiled operator depends on, but for its sources: versions, paths, processor, host if need be."""
    import deepspeed
    import torch

    parts = [
        sys.version, sys.prefix, torch.__version__, torch.__file__, str(torch.version.cuda), str(torch.version.hip),
        deepspeed.__version__, deepspeed.__file__, platform.machine(), _processor(),
        *(f"{name}={os.environ.get(name, '')}" for name in _COMPILERS),
        platform.node() if network else "",
    ]  # fmt: skip
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    version = ".".join(map(str, sys.version_info[:2]))
    return f"py{version}-torch{torch.__version__}-deepspeed{deepspeed.__version__}-{digest}"


def _processor() -> str:
    """The instructions that the processor knows: operators are compiled for this very one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, which need not exist yet; "" where the kernel does not tell."""
    existing = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    found, longest = "", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            mount = before.split()[4].replace("\\040", " ")
            inside = existing.resolve().is_relative_to(mount)
            if inside and len(mount) >= longest:
                found, longest = after.split()[0], len(mount)
    return found


def _load(builder: Any, original: Callable[..., Any], verbose: bool) -> Any:
    """DeepSpeed's `jit_load` of one operator: imported if it is there, else compiled."""
    folder = operators_folder() / f"{builder.name}-{_sources_digest(builder)}"
    if not folder.is_dir():
        with _only_one(folder.with_suffix(".flock"), builder.name):
            if not folder.is_dir():
                logger.info("compiling DeepSpeed's operator %s, once for this environment: a minute or more", builder.name)
                return _compile(builder, original, verbose, folder)
    return _imported(builder.name, folder)


def _sources_digest(builder: Any) -> str:
    digest = hashlib.sha256()
    for source in builder.sources():
        path = Path(builder.deepspeed_src_path(source)) if source else None
        if path and path.is_file():
            stat = path.stat()
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _compile(builder: Any, original: Callable[..., Any], verbose: bool, folder: Path) -> Any:
    """Compile in a fresh folder, then give it its name. Only the holder of the operator's lock calls it."""
    for abandoned in folder.parent.glob(f"{_BUILDS}{builder.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{_BUILDS}{builder.name}-", dir=folder.parent))
    try:
        with _torch_compiles_in(building):
            module = original(builder, verbose)
        (building / builder.name).rename(folder)
        if getattr(module, "__file__", None):
            module.__file__ = str(folder / Path(module.__file__).name)
        return module
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _torch_compiles_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        else:
            os.environ["TORCH_EXTENSIONS_DIR"] = before


def _imported(name: str, folder: Path) -> ModuleType:
    library = next(path for path in sorted(folder.iterdir()) if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not a module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _only_one(lock: Path, operator: str) -> Iterator[None]:
    """Hold the lock while the body runs; the kernel releases it when this process ends, however it ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that compiles DeepSpeed's operator %s", operator)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
