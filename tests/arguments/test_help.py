"""`--help`: at once, untruncated, and with an answer for every name that people search."""

import json
import subprocess
import sys

import pytest

from zero_sft.arguments import specifications as table
from zero_sft.arguments.help import answer_help, help_text
from zero_sft.arguments.names import REFUSALS, TRANSLATIONS
from zero_sft.arguments.specifications import specifications
from zero_sft.options.format_help import wants_help

HEAVY = {"torch", "transformers", "trl", "datasets", "deepspeed", "accelerate", "pyarrow"}


def shown(capsys, *argv):
    """Exit status and output of a command line."""
    assert wants_help(argv)
    return answer_help(argv), capsys.readouterr().out


def test_the_shipped_table_is_what_the_installed_libraries_say():
    """`make arguments` writes it again."""
    assert table.TABLE.read_text(encoding="utf-8") == table.table_text()
    assert dict(table.specifications_from_table()) == dict(specifications())


def test_other_versions_are_asked_themselves(monkeypatch):
    monkeypatch.setattr(table, "installed_versions", lambda: {"trl": "99"})
    assert table.specifications_from_table() is specifications()


@pytest.mark.parametrize("command", ["zero_sft.train", "zero_sft.commands.data", "zero_sft.commands.estimate"])
def test_help_imports_nothing_heavy(command):
    code = (
        "import importlib, sys, json\n"
        f"try: importlib.import_module({command!r}).main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.stderr.write(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not HEAVY & set(json.loads(done.stderr))
    assert "--model_max_length" in done.stdout


def test_nothing_is_cut():
    overview, everything = help_text(), help_text("all")
    specs = {name: spec for name, spec in specifications().items() if name not in {*REFUSALS, *TRANSLATIONS, "local_rank"}}
    flat = " ".join(everything.split())
    for name, spec in specs.items():
        assert f"\n  --{name} = " in everything, name
        assert " ".join(spec.help.split()) in flat, name
    for text in (overview, everything):
        assert max(map(len, text.splitlines())) < 140
        for name in (*REFUSALS, *TRANSLATIONS):
            assert f"--{name}" in text, name
    for refusal in REFUSALS.values():
        assert refusal.reason in flat


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--help", "learning_rate"), ("--learning_rate = 2e-05", "Expected: a number.")),
        (("--help", "--learning-rate"), ("--learning_rate = 2e-05",)),
        (("--help=learning_rate",), ("--learning_rate = 2e-05",)),
        (("--help", "learning"), ("--learning_rate", "with 'learning' in their text", "--warmup_steps")),
        (("--help", "learning_rat"), ("--learning_rate",)),
        (("--help", "max_length"), ("--max_length  is  --model_max_length", "--model_max_length = 512", "longest sequence")),
        (("--help", "gradient_checkpointing"), ("is  --activation_checkpointing", "--activation_checkpointing = True")),
        (("--help", "evaluation_strategy"), ("--eval_strategy = 'no'",)),
        (("--help", "flash_attn"), ("--attn_implementation flash_attention_2 (for True)",)),
        (("--help", "fsdp"), ("--fsdp is refused: ", "--deepspeed")),
        (("--help", "local_rank"), ("--local_rank is ignored",)),
        (("--help", "seed", "max_steps"), ("--seed = 42", "--max_steps = -1")),
        (("--help", "model_max_length"), ("Also understood: --max_length, --max_seq_length",)),
    ],
)
def test_one_argument(capsys, argv, parts):
    status, text = shown(capsys, *argv)
    assert status == 0
    for part in parts:
        assert part in text
    assert len(text) < len(help_text()) / 4


def test_the_overview_and_what_nothing_matches(capsys):
    assert shown(capsys, "--seed", "1", "--help") == (0, help_text())
    assert shown(capsys, "--help", "--seed", "1") == (0, help_text())
    assert shown(capsys, "-h", "all") == (0, help_text("all"))
    status, text = shown(capsys, "--help", "zzqq")
    assert status == 2
    assert "'zzqq'" in text


def test_only_rank_0_answers(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shown(capsys, "--help") == (0, "")
