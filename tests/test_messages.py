"""Tests of the codes and sentences of the package's errors."""

import ast
import copy
import re

import pytest

from tests.errors import error_codes
from tests.messages import CLASSES, SENTENCES, listed, sites
from zero_sft.errors import ArgumentError, ConfigError, DataError, ZeroSftError

TOPICS = {
    "adapter", "arguments", "checkpoint", "cluster", "config", "data", "ds_config", "estimate", "export", "generation_config",
    "hub", "launcher", "manifest", "model", "plan", "preflight", "resume", "rope", "save", "tokenizer", "training", "version",
}  # fmt: skip


def test_every_error_has_a_code_of_a_known_topic():
    found = list(sites())
    assert len(found) > 250, "the scan finds the package's errors"
    for site in found:
        if site.code is not None:
            topic, _, kind = site.code.partition(".")
            assert topic in TOPICS, site
            assert re.fullmatch(r"[a-z][a-z0-9_]*", kind), site


def test_the_list_of_sentences_is_that_of_the_source():
    assert listed() == SENTENCES.read_text(encoding="utf-8"), "run `python -m tests.messages`, and read what it changes"


def test_no_test_matches_a_sentence_of_an_error():
    """Tests use `tests.errors.raises` with the code and the values instead."""
    tests = SENTENCES.parent
    found = [
        f"{path.relative_to(tests)}:{line}" for path in tests.rglob("*.py") for line in matched_sentences(path.read_text())
    ]
    assert not found, "match the code and the values"
    assert matched_sentences("with pytest.raises((ValueError, errors.DataError), match='no data'): pass") == [1]


def matched_sentences(source: str) -> list[int]:
    """Return the lines with `pytest.raises(..., match=...)` for an error of the package."""
    return [
        call.lineno
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.raises"
        if any(word.arg == "match" for word in call.keywords)
        and any(name in CLASSES for each in call.args for name in re.findall(r"\w+", ast.unparse(each)))
    ]


def test_a_code_survives_another_process():
    error = copy.copy(DataError("a", code="data.x", listed=["data.y"]))  # by its __reduce__, as pickle does
    assert (type(error), str(error), error.codes, error.code) == (DataError, "a", ("data.x", "data.y"), "data.x")


def test_one_problem_keeps_its_code_and_several_are_listed_with_theirs():
    one, two = ArgumentError("no --a", code="arguments.a"), ArgumentError("no --b", code="arguments.b")
    alone = ArgumentError.listing([one], "wrong:", code="arguments.unusable")
    assert (str(alone), alone.codes) == ("no --a", ("arguments.a",))
    both = ArgumentError.listing([one, two], "wrong:", code="arguments.unusable")
    assert both.with_code == "wrong:\n- no --a [arguments.a]\n- no --b [arguments.b]"
    assert both.codes == ("arguments.unusable", "arguments.a", "arguments.b")
    assert error_codes(both.with_code) == ["arguments.a", "arguments.b"]
    remedied = ConfigError.listing([one], "wrong:", remedy="Mend it.", code="ds_config.unusable")
    assert remedied.with_code == "wrong:\n- no --a\nMend it. [arguments.a]"


@pytest.mark.world_size(2)
def test_a_code_reaches_every_rank():
    from zero_sft.cluster.stages import collective_stage
    from zero_sft.cluster.world import World

    world = World.detect()
    with pytest.raises(ZeroSftError) as caught, collective_stage(world, "reading"):
        if world.rank == 1:
            raise DataError("a", code="data.x", listed=["data.y"])
    assert (type(caught.value), caught.value.codes) == (DataError, ("data.x", "data.y"))
