"""The job's arguments: FastChat's names and defaults, typed, from a command line or a file.

Two steps. `parse` turns text into checked plain values: quick, pure, the same on every rank. `build_training_arguments` makes
the Trainer's object of them, which looks for devices and registers the DeepSpeed config; so it runs after
`distributed.connect`, and before anything is read, so that what would be refused later is refused at the start.
"""

from zero_sft.arguments.build import build_training_arguments
from zero_sft.arguments.groups import DataArguments, ModelArguments
from zero_sft.arguments.help import answer_help, help_text
from zero_sft.arguments.parse import Parsed, parse
from zero_sft.options.help import wants_help

__all__ = [
    "DataArguments",
    "ModelArguments",
    "Parsed",
    "answer_help",
    "build_training_arguments",
    "help_text",
    "parse",
    "wants_help",
]
