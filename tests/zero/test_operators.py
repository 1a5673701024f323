"""A lock that a killed compilation left behind is named instead of waited for."""

import os
import time

import pytest

from zero_sft.errors import ConfigError
from zero_sft.zero.operators import STALE_SECONDS, logger, prefer_own_ninja, require_no_stale_lock


def lock(root, operator, age_seconds, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
    path = root / operator / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


@pytest.mark.parametrize("operator", ["async_io", "cpu_adam", "deepspeed_shm_comm"])
def test_an_old_lock(tmp_path, monkeypatch, operator):
    path = lock(tmp_path, operator, STALE_SECONDS + 60, monkeypatch)
    with pytest.raises(ConfigError, match=rf"{operator} has been locked for 21 minutes.*rm {path}"):
        require_no_stale_lock()


def test_a_young_lock_is_named(tmp_path, monkeypatch):
    path = lock(tmp_path, "py311_cpu/cpu_adam", 90, monkeypatch)
    warnings = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: warnings.append(text % values))
    require_no_stale_lock()
    assert "compiles DeepSpeed's operator cpu_adam" in warnings[0]
    assert str(path) in warnings[0]


def test_others_locks_are_none_of_ours(tmp_path, monkeypatch):
    lock(tmp_path, "somebody_elses", STALE_SECONDS + 60, monkeypatch)
    require_no_stale_lock()


def test_this_environments_ninja_comes_first(tmp_path, monkeypatch):
    """Once: a second call changes nothing."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    prefer_own_ninja()
    assert os.environ["PATH"] == "/usr/bin", "it has none"
    (tmp_path / "ninja").touch()
    for _ in range(2):
        prefer_own_ninja()
        assert os.environ["PATH"] == f"{tmp_path}:/usr/bin"
