"""Run a function in a child process that dies before its n-th step on the file system, for every n."""

import os
import sys
from collections.abc import Callable, Iterator

_STEPS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate", "ctypes.dlsym"}
"""Audit events of what changes a folder; `renameat2` is looked up just before it is called."""


def killed_before_each_step(prepare: Callable[[], Callable[[], None]]) -> Iterator[int]:
    """Yield after each death; `prepare` makes the folders and returns what the child runs. Ends after a run to the end."""
    number = 0
    while True:
        number += 1
        act = prepare()
        child = os.fork()
        if child == 0:
            _die_before(number)
            act()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), code
        yield number
        if code == 0:
            return


def _die_before(number: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        seen += event in _STEPS
        if seen == number:
            os._exit(9)

    sys.addaudithook(hook)
