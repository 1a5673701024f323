"""Set-ups of ZeRO-3 load and train as transformers' own load does, in each method and for each caller."""

import os
from pathlib import Path

import pytest
import torch

from tests import models
from tests.adapters.test_attach import save_calm
from tests.compatibility.cells import CALLERS
from tests.compatibility.document import DOCUMENT, names_in
from tests.compatibility.methods import METHODS
from tests.compatibility.setups import SETUPS, Setup
from tests.compatibility.trials import outcome
from tests.errors import raises
from tests.library.test_trainers import TRAINERS

QUICK = {("both: cpu", "all parameters")}
TRIED = [name for name, setup in SETUPS.items() if not setup.refused and not setup.gpu_only]
DAY = int(os.environ.get("ZERO_SFT_SLOW_ORDER", "0"))


def cases():
    """The quick cases, and each set-up with one method, on each day another. `make compatibility` tries all."""
    methods = list(METHODS)
    for number, name in enumerate(TRIED):
        method = methods[(number + DAY) % len(methods)]
        if (name, method) not in QUICK:
            yield pytest.param(name, method, marks=pytest.mark.slow)
    yield from sorted(QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_calm("llama", tmp_path_factory.mktemp("compatibility") / "llama")


@pytest.mark.parametrize(("setup", "method"), cases())
def test_all_callers(folder, setup, method):
    if SETUPS[setup].needs_nvme:
        models.require_async_io()
    results = outcome(folder, setup, method)
    assert {caller: result for caller, result in results.items() if result != "passed"} == {}


def load(folder: Path, setup: Setup, nvme: Path) -> None:
    from zero_sft import load_model

    with raises(setup.refused, ""):
        load_model(str(folder), ds_config=setup.ds_config(str(nvme)), dtype=torch.float32)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if setup.refused])
def test_refused_by_the_load(folder, tmp_path, name):
    load(folder, SETUPS[name], tmp_path)


@pytest.mark.parametrize("name", [name for name, setup in SETUPS.items() if setup.refused.startswith("ds_config")])
def test_refused_by_the_job_at_its_start(name):
    from zero_sft.zero.ds_schema import schema_problems

    problems = schema_problems(SETUPS[name].ds_config("/nowhere"))
    assert problems
    assert SETUPS[name].refused in {problem.code for problem in problems} | {"ds_config.refused_by_deepspeed"}


def test_the_document_is_of_these_set_ups_methods_and_callers():
    """`make compatibility` writes it."""
    assert names_in(DOCUMENT.read_text(encoding="utf-8")) == {*SETUPS, *METHODS, *CALLERS, *TRAINERS}
