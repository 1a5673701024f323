"""Compile DeepSpeed's operators at first use into a folder of this project, under a lock that ends with its process.

torch marks a running build with a file `lock`, and waits for its removal silently and without a time limit. If the building
process is killed, the file stays, and every later run on the machine hangs. Environments that share torch's folder also replace
each other's builds, since the paths of their sources differ.

Here each operator is compiled in a new folder, which is renamed when it is complete. One process on the file system compiles
under `flock`, which the kernel releases however the process ends. The others wait, then import the result without compiling.
After a killed build, the next process builds again.

Only operators that a run asks for are compiled or imported.
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
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import psutil
import torch

from zero_sft.zero.internals import operator_builder

logger = logging.getLogger(__name__)

_BUILDS = "building-"
"""Prefix of the folders of running and killed builds."""

# fmt: off
_LOCAL_FILE_SYSTEMS = frozenset([
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "overlayfs", "aufs", "jfs", "9p", "virtiofs",
])
# fmt: on
_COMPILERS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDA_HOME", "ROCM_HOME", "DS_ENABLE_NINJA")


def prefer_environment_ninja() -> None:
    """Put this environment's folder of programs first on PATH, if it has ninja. Does not communicate.

    torch uses the first `ninja` on PATH.
    """
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if (Path(programs) / "ninja").exists() and path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join(filter(None, (programs, path)))


def install_operator_builder() -> None:
    """Patch DeepSpeed, for the rest of the process, to build its operators as this module describes. Does not communicate.

    Call this before DeepSpeed joins the ranks, because its CPU backend loads an operator then. Further calls change nothing.
    """
    builder = operator_builder()
    original = builder.jit_load
    if getattr(original, "builds_in_own_folder", False):
        return

    @functools.wraps(original)
    def jit_load(self: Any, verbose: bool = True) -> Any:
        return _load(self, original, verbose)

    setattr(jit_load, "builds_in_own_folder", True)  # noqa: B010 - function attributes have no type stub
    builder.jit_load = jit_load
    prefer_environment_ninja()


def operators_folder() -> Path:
    """Return the folder for the operators of this environment on this kind of machine. Creates it if necessary.

    It is in `TORCH_EXTENSIONS_DIR` if that is set, else in the user's cache folder. If that can't be written, it is in the
    temporary folder. On a network file system each host has a folder, because `flock` may not work across hosts.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "zero_sft" / "operators").expanduser()
    try:
        folder = root / _environment(network=_file_system(root) not in _LOCAL_FILE_SYSTEMS)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        folder = _private_temporary_folder() / _environment(network=False)
        logger.debug("%s can't be written (%s); DeepSpeed's operators are built in %s instead", root, error, folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _private_temporary_folder() -> Path:
    """Return a folder in the temporary folder that only this user can write: what is in it is imported as code.

    It has the same name for each process. If another user made a folder of that name, it is a new one.
    """
    folder = Path(tempfile.gettempdir()) / f"zero_sft-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="zero_sft-"))


@functools.cache
def _environment(network: bool) -> str:
    """Return a folder name from the versions, paths and processor on which a compiled operator depends.

    Its sources have a separate digest (`_sources_digest`).
    The name of the host is included if the folder is on a network file system.
    """
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
    """Return the processor's instruction sets, because operators are compiled for this processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, which need not exist; "" if the kernel does not report it."""
    with contextlib.suppress(OSError):
        mounted = {partition.mountpoint: partition.fstype for partition in psutil.disk_partitions(all=True)}
        folders = map(str, (path.resolve(), *path.resolve().parents))
        return next((mounted[folder] for folder in folders if folder in mounted), "")
    return ""


def _load(builder: Any, original: Callable[..., Any], verbose: bool) -> Any:
    """Replace DeepSpeed's `jit_load` of one operator: import the compiled operator, or compile it."""
    folder = operators_folder() / f"{builder.name}-{_sources_digest(builder)}"
    if not folder.is_dir():
        with _operator_lock(folder.with_suffix(".flock"), builder.name):
            if not folder.is_dir():
                logger.info("compiling DeepSpeed's operator %s, once per environment: this takes minutes", builder.name)
                return _compile(builder, original, verbose, folder)
    return _import_operator(builder.name, folder)


def _sources_digest(builder: Any) -> str:
    digest = hashlib.sha256()
    for source in builder.sources():
        path = Path(builder.deepspeed_src_path(source)) if source else None
        if path and path.is_file():
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _compile(builder: Any, original: Callable[..., Any], verbose: bool, folder: Path) -> Any:
    """Compile in a new folder, then rename that to `folder`. Only the holder of the operator's lock may call this."""
    for abandoned in folder.parent.glob(f"{_BUILDS}{builder.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f"{_BUILDS}{builder.name}-", dir=folder.parent))
    try:
        with _torch_extensions_dir(building):
            module = original(builder, verbose)
        (building / builder.name).rename(folder)
        if getattr(module, "__file__", None):
            module.__file__ = str(folder / Path(module.__file__).name)
        return module
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _torch_extensions_dir(folder: Path) -> Iterator[None]:
    previous = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        else:
            os.environ["TORCH_EXTENSIONS_DIR"] = previous


def _import_operator(name: str, folder: Path) -> ModuleType:
    library = next(path for path in sorted(folder.iterdir()) if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not a module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _operator_lock(lock: Path, operator: str) -> Iterator[None]:
    """Hold an operator's lock while the body runs. The kernel releases it if this process dies."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process, which is compiling DeepSpeed's operator %s", operator)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
