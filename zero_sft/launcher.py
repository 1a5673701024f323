"""Enable `-m` in DeepSpeed's launcher, on request and reversibly: `python -m zero_sft.launcher enable|disable|status`.

DeepSpeed's console script `deepspeed` accepts `--module` but not the short form: `deepspeed -m zero_sft.train` fails with
"unrecognized arguments: -m". `enable` replaces the script with a small shim. It adds `-m` as a name of `--module` to
DeepSpeed's argument parser, changes the default of `--log_level` for modules of this package, and runs DeepSpeed's `main`. So
DeepSpeed, in any installed release, still parses all launcher options and everything after the user's module; a `-m` among the
user's arguments stays there. The shim also applies the fixes of `cluster/deepspeed_command.py` (master port, signals, quoting
for pdsh). It runs without them if it can't import them, so that removing this package does not break DeepSpeed.

The original script is kept next to the shim in a hidden file, and `disable` moves it back unchanged. An upgrade of DeepSpeed
overwrites the shim: `status` and `launch_note` then report it.

Left out: patching DeepSpeed's modules, which would affect every program of the environment, and changing scripts of other
environments. This module never imports DeepSpeed; it only reads and writes the script files.
"""

import argparse
import contextlib
import enum
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from zero_sft.errors import ConfigError

SCRIPT_NAMES = ("deepspeed", "ds")  # DeepSpeed installs the second as an alias of the first
MODULE_FORM = "deepspeed --num_gpus 8 --module zero_sft.train ..."

_MARKER = "# zero_sft launcher shim"
_SHIM_BODY = f'''\
{_MARKER}: DeepSpeed's launcher, with -m as a short form of --module; quieter for zero_sft's own modules.
# Undo with: python -m zero_sft.launcher disable
import argparse
import sys

from deepspeed.launcher import runner

try:
    from zero_sft.cluster.deepspeed_command import run
except ImportError:  # zero_sft was removed, or is older

    def run(runner):
        return runner.main()


_add_argument = argparse.ArgumentParser.add_argument
_STARTS_ZERO_SFT = any(word.startswith("zero_sft.") for word in sys.argv[1:])


def _add_our_argument(parser, *flags, **options):
    """Register `-m` together with `--module`, so that the launcher's own parser decides what `-m` belongs to.

    At its level "info" the launcher prints the whole command once, and once more for each rank; at "warning", that there is
    no hostfile.
    """
    if flags == ("--module",):
        flags = ("-m", "--module")
    if flags == ("--log_level",) and _STARTS_ZERO_SFT:
        options["default"] = "error"
    return _add_argument(parser, *flags, **options)


if __name__ == "__main__":
    argparse.ArgumentParser.add_argument = _add_our_argument
    sys.exit(run(runner))
'''

# Installers write the interpreter's path in one of two ways. The second is for paths that are too long for a `#!` line, or
# relocatable; it is valid both as shell and as Python:
#   #!/env/bin/python3
#   #!/bin/sh\n'''exec' /env/bin/python3 "$0" "$@"\n' '''
_HEAD = re.compile(rb"#![^\n]*\n(?:'''exec' [^\n]*\n' '''\n)?")


class State(enum.Enum):
    """State of the launcher script in this environment; the value is the text for the user."""

    ENABLED = "enabled"
    OUTDATED = "enabled by another version of zero_sft: run enable again"
    NOT_ENABLED = "not enabled"
    REPLACED = "was enabled but a DeepSpeed upgrade/reinstall replaced the script: run enable again"


def enable(folders: Sequence[Path] | None = None) -> None:
    """Replace each launcher script with the shim and keep the original next to it. Idempotent.

    A script that DeepSpeed has rewritten since the last `enable` becomes the new original. Raises `ConfigError` if
    there is no script, it is not DeepSpeed's, or its folder is not writable.
    """
    scripts = {script: _read_launcher(script) for script in _scripts(folders)}
    for script, content in scripts.items():
        with _writing(script):
            mode = script.stat().st_mode & 0o7777
            if not _is_shim(content):
                _write_atomically(_original_of(script), content, mode)
            _write_atomically(script, _shim_for(content), mode)


def disable(folders: Sequence[Path] | None = None) -> None:
    """Restore the original of each launcher script, with its mode. Does nothing if there is no shim.

    If DeepSpeed has replaced the shim with a newer script, that script stays and the old original is deleted.
    Raises `ConfigError` if an original is missing or the folder is not writable.
    """
    for script in _scripts(folders):
        original = _original_of(script)
        with _writing(script):
            if not _is_shim(script.read_bytes()):
                original.unlink(missing_ok=True)
            elif original.exists():
                original.replace(script)
            else:
                raise ConfigError(
                    f"{script} is the shim of zero_sft, but its original, {original.name}, is no longer next to it. "
                    "Reinstall DeepSpeed: pip install --force-reinstall --no-deps deepspeed",
                    code="launcher.original_gone",
                )


def status(folders: Sequence[Path] | None = None) -> State:
    """Return the joint state of the launcher scripts. Raises `ConfigError` if there is no script."""
    scripts = _scripts(folders)
    contents = [script.read_bytes() for script in scripts]
    shims = [_is_shim(content) for content in contents]
    if all(shims):
        is_current = all(content == _shim_for(content) for content in contents)
        return State.ENABLED if is_current else State.OUTDATED
    if any(shims) or any(_original_of(script).exists() for script in scripts):
        return State.REPLACED
    return State.NOT_ENABLED


def launch_note(folders: Sequence[Path] | None = None) -> str | None:
    """Return a line for the job's log if an upgrade removed the shim or left an old one, else None. Never raises."""
    try:
        state = status(folders)
    except (ConfigError, OSError):
        return None
    if state not in (State.REPLACED, State.OUTDATED):
        return None
    return f"The launcher's -m {'' if state is State.REPLACED else 'was '}{state.value} (python -m zero_sft.launcher enable)."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 for an error. Only this function prints."""
    parser = argparse.ArgumentParser(
        prog="python -m zero_sft.launcher",
        description="Let the `deepspeed` command of this environment take -m as a short form of --module.",
        epilog=f"Without it, write: {MODULE_FORM}",
    )
    parser.add_argument("action", choices=("enable", "disable", "status"), help="disable restores DeepSpeed's own script")
    action = parser.parse_args(arguments).action
    try:
        if action == "enable":
            enable()
        elif action == "disable":
            disable()
        message = "disabled" if action == "disable" else status().value
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"zero_sft.launcher: {error.with_code if isinstance(error, ConfigError) else error}\n")
        return 2
    sys.stdout.write(f"deepspeed -m: {message}\n")
    return 0


def _scripts(folders: Sequence[Path] | None) -> list[Path]:
    """Return DeepSpeed's launcher scripts in the first of `folders` that has any.

    The default folders are those where installers put scripts for this interpreter, and never others on PATH. The second
    default differs from the first only for some system-wide interpreters.
    """
    if folders is None:
        folders = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    for folder in folders:
        script, *aliases = (folder / name for name in SCRIPT_NAMES)
        if script.is_file():
            return [script, *(alias for alias in aliases if alias.is_file() and b"deepspeed" in alias.read_bytes())]
    raise ConfigError(
        f"no `deepspeed` command in {' or '.join(dict.fromkeys(map(str, folders)))}, the scripts of {sys.executable}. "
        "Install DeepSpeed into this environment (pip install deepspeed), or run this with the Python that has it. "
        f"This form needs no change to any script: {MODULE_FORM}",
        code="launcher.no_deepspeed_command",
    )


def _read_launcher(script: Path) -> bytes:
    """Return the content of the script. Raises `ConfigError` if it is not a plain script as installers write it."""
    content = script.read_bytes()
    if script.is_symlink():
        problem = f"is a symbolic link to {script.resolve()}, which other environments may use as well"
    elif not _HEAD.match(content) or b"deepspeed" not in content:
        problem = "is not the Python script that DeepSpeed installs"
    else:
        return content
    raise ConfigError(
        f"{script} {problem}, so it stays unchanged. Reinstall DeepSpeed (pip install --force-reinstall --no-deps deepspeed), "
        f"or use the form that needs no change: {MODULE_FORM}",
        code="launcher.unknown_script",
    )


def _is_shim(content: bytes) -> bool:
    return _MARKER.encode() in content


def _shim_for(content: bytes) -> bytes:
    """Return the shim with the same interpreter as the script `content`."""
    head = _HEAD.match(content)
    return (head.group() if head else b"") + _SHIM_BODY.encode()


def _original_of(script: Path) -> Path:
    return script.with_name(f".{script.name}.zero_sft-original")


@contextlib.contextmanager
def _writing(script: Path) -> Iterator[None]:
    """Convert any `OSError` into a `ConfigError` with the remedy."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"can't change {script}: {error.strerror or error}. Run this as the owner of {script.parent}, "
            f"or use the form that needs no change: {MODULE_FORM}",
            code="launcher.script_unwritable",
        ) from error


def _write_atomically(target: Path, content: bytes, mode: int) -> None:
    """Write a file atomically, because the launcher may start at any moment."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
