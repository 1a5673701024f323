"""Typed arguments of the job, with FastChat's names and defaults, from a command line or a file.

There are two steps. `parse` turns text into checked plain values; it is fast and gives the same result on every rank.
`build_training_arguments` creates the Trainer's arguments object from them, which looks for devices and registers the DeepSpeed
config. The second step runs after the process group is initialized and before anything is read, so that errors appear early.
"""

from zero_sft.arguments.build import build_training_arguments
from zero_sft.arguments.groups import DataArguments, ModelArguments
from zero_sft.arguments.help import answer_help, help_text
from zero_sft.arguments.parse import ParsedArguments, parse
from zero_sft.options.format_help import wants_help

__all__ = [
    "DataArguments",
    "ModelArguments",
    "ParsedArguments",
    "answer_help",
    "build_training_arguments",
    "help_text",
    "parse",
    "wants_help",
]
