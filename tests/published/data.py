"""Samples in the shapes that well-known data sets are published in, and what is trained on in each, or why it is refused.

The keys are those of the data sets' pages; the texts are ours.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Q, A, Q2, A2, SYSTEM = "What is 2+2?", "It is 4.", "And 3+3?", "That is 6.", "You are brief."


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedData:
    """One sample. `answers`: the texts that are trained on; None where it is refused, with the code and values `refused`."""

    sample: dict[str, Any]
    answers: tuple[str, ...] | None = (A, A2)
    refused: tuple[str, ...] = ()
    kind: str = "jsonl"


def _turns(*texts: str, names: tuple[str, str], keys: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{keys[0]: names[number % 2], keys[1]: text, **more} for number, text in enumerate(texts)]


def _messages(**more: Any) -> list[dict[str, Any]]:
    return _turns(Q, A, Q2, A2, names=("user", "assistant"), keys=("role", "content"), **more)


def _sharegpt(**more: Any) -> list[dict[str, Any]]:
    return _turns(Q, A, Q2, A2, names=("human", "gpt"), keys=("from", "value"), **more)


_DETAIL = [{"begin_offset": 0, "end_offset": len(A) - 1, "train": True}]
_PREFERRED = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]

DATA: dict[str, PublishedData] = {
    "FastChat dummy_conversation": PublishedData(sample={"id": "identity_0", "conversations": _sharegpt()}, kind="json"),
    "ShareGPT_Vicuna_unfiltered": PublishedData(sample={"id": "QWJhYvA_0", "conversations": _sharegpt()}, kind="json"),
    "OpenHermes-2.5": PublishedData(
        sample={
            "custom_instruction": None, "topic": None, "model_name": None, "model": None, "skip_prompt_formatting": False,
            "category": "orca", "conversations": [{"from": "system", "value": SYSTEM, "weight": None},
                                                  *[{**turn, "weight": None} for turn in _sharegpt()]],
            "views": None, "language": None, "id": None, "title": None, "idx": None, "hash": None, "avatarUrl": None,
            "system_prompt": None, "source": "airoboros2.2",
        },
        kind="parquet",
    ),
    "SlimOrca": PublishedData(
        sample={"conversations": [{"from": "system", "value": SYSTEM, "weight": None},
                                  {"from": "human", "value": Q, "weight": 0.0}, {"from": "gpt", "value": A, "weight": 1.0}]},
        answers=(A,),
    ),
    "ultrachat_200k": PublishedData(sample={"prompt": Q, "prompt_id": "f0e37e9f", "messages": _messages()}, kind="parquet"),
    "no_robots": PublishedData(
        sample={"prompt": Q, "prompt_id": "a1", "messages": _messages(), "category": "Closed QA"}, kind="parquet"
    ),
    "tulu-3-sft-mixture": PublishedData(sample={"id": "x_1", "messages": _messages(), "source": "ai2"}, kind="parquet"),
    "smoltalk": PublishedData(sample={"messages": _messages(), "source": "smol-magpie-ultra"}, kind="parquet"),
    "alpaca": PublishedData(
        sample={"instruction": Q, "input": "", "output": A, "text": f"Below is an instruction. {Q} ### Response: {A}"},
        answers=(A,), kind="parquet",
    ),
    "alpaca_data.json": PublishedData(sample={"instruction": Q, "input": "", "output": A}, answers=(A,), kind="json"),
    "LLaMA-Factory alpaca with system and history": PublishedData(
        sample={"instruction": Q2, "input": "", "output": A2, "system": SYSTEM, "history": [[Q, A]]}, kind="json"
    ),
    "LLaMA-Factory sharegpt with tools": PublishedData(
        sample={"conversations": [{"from": "human", "value": Q}, {"from": "function_call", "value": '{"name": "add"}'},
                                  {"from": "observation", "value": "4"}, {"from": "gpt", "value": A}],
                "system": SYSTEM, "tools": json.dumps([{"name": "add"}])},
        answers=None, refused=("data.template_without_calls", "hermes"),
    ),
    "dolly-15k": PublishedData(
        sample={"instruction": Q, "context": "", "response": A, "category": "closed_qa"},
        answers=None, refused=("data.unknown_format", "response"),
    ),
    "LIMA": PublishedData(
        sample={"conversations": [Q, A, Q2, A2], "source": "stackexchange"}, answers=None, refused=("data.bad_turn", "turn 1")
    ),
    "ultrafeedback_binarized": PublishedData(
        sample={"prompt": Q, "prompt_id": "x", "chosen": _PREFERRED, "rejected": _PREFERRED, "messages": _PREFERRED,
                "score_chosen": 8.5, "score_rejected": 8.5},
        answers=None, refused=("data.key_of_another_format", "chosen"), kind="parquet",
    ),
    "KTO": PublishedData(
        sample={"prompt": Q, "completion": A, "label": False}, answers=None, refused=("data.key_of_another_format", "label")
    ),
    "OpenAI fine-tuning, weights": PublishedData(
        sample={"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": Q},
                             {"role": "assistant", "content": A, "weight": 0}, {"role": "user", "content": Q2},
                             {"role": "assistant", "content": A2, "weight": 1}]},
        answers=(A2,),
    ),
    "ms-swift, loss of a turn": PublishedData(
        sample={"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A, "loss": False},
                             {"role": "user", "content": Q2}, {"role": "assistant", "content": A2, "loss": True}]},
        answers=(A2,),
    ),
    "axolotl, train_detail": PublishedData(
        sample={"messages": [{"role": "user", "content": Q},
                             {"role": "assistant", "content": A, "train_detail": _DETAIL}]},
        answers=(A,),
    ),
    "OpenAI parts": PublishedData(
        sample={"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, {"role": "assistant", "content": A}]},
        answers=(A,),
    ),
    "LLaVA": PublishedData(
        sample={"id": "1", "image": "coco/1.jpg", "conversations": _sharegpt()},
        answers=None, refused=("data.key_of_another_format", "image"), kind="json",
    ),
    "TRL prompt-completion, conversational": PublishedData(
        sample={"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]}, answers=(A,)
    ),
    "TRL language modeling": PublishedData(sample={"text": f"{Q} {A}"}, answers=(f"{Q} {A}",)),
    "FineWeb": PublishedData(
        sample={"text": f"{Q} {A}", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2013-20", "url": "http://x", "date": "2013-05-18",
                "file_path": "s3://x", "language": "en", "language_score": 0.9, "token_count": 11},
        answers=(f"{Q} {A}",), kind="parquet",
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Write the sample to a file of the kind that the data set is published as."""
    data = DATA[name]
    path = folder / f"data.{data.kind}"
    if data.kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([data.sample]), path)
    else:
        path.write_text(json.dumps([data.sample] if data.kind == "json" else data.sample) + "\n")
    return path
