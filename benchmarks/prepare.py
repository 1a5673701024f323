"""Measure how much longer data preparation takes than tokenising alone: `python -m benchmarks.prepare --model <folder>`.

The conversations are combined from the shipped ones, with about 700 tokens each. The reference is `tokenizer(texts)` on the
rendered texts, in as many processes, which start as this package's do. It is compared with the whole preparation: reading,
rendering, tokenising, labels, and rows on disk. Each round runs both; ratios are within a round.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zero_sft.data.dataset import prepare_source
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.templates.choose import choose_template, render
from zero_sft.data.workers import BATCH_OBJECTS, usable_processes
from zero_sft.packaged_file import packaged_file

TOKENS = 700


def conversations(count: int, path: Path, tokenizer: Any) -> None:
    """Write `count` conversations of several exchanges, `TOKENS` tokens on average, as JSON lines."""
    samples = json.loads(packaged_file("examples", "conversations.json").read_text(encoding="utf-8"))
    exchanges = [sample["conversations"][:2] for sample in samples]
    texts = [f"{question['value']}{answer['value']}" for question, answer in exchanges]
    mean_tokens = statistics.mean(len(tokenizer(text)["input_ids"]) + 10 for text in texts)
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            chosen = rng.choices(exchanges, k=max(1, round(rng.uniform(0.2, 1.8) * TOKENS / mean_tokens)))
            turns = [turn for exchange in chosen for turn in exchange]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


_tokenizer: Any = None


def _start(tokenizer: Any) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizer


def _tokenise(texts: list[str]) -> int:
    return sum(map(len, _tokenizer(texts, add_special_tokens=False)["input_ids"]))


def tokenise_alone(texts: list[str], tokenizer: Any, processes: int) -> tuple[float, int]:
    """Run `tokenizer(texts)` in `processes` new processes, and return the seconds and the number of tokens."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer,)) as pool:
        batches = [texts[start : start + BATCH_OBJECTS] for start in range(0, len(texts), BATCH_OBJECTS)]
        tokens = sum(pool.map(_tokenise, batches))
    return time.monotonic() - start, tokens


def main() -> int:
    """Measure, and print one line per round."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder with a tokenizer")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=usable_processes())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ratios = []
    with tempfile.TemporaryDirectory(prefix="zero_sft_") as top:
        data = Path(top) / "data.jsonl"
        conversations(options.samples, data, tokenizer)
        root = Path(top) / "cache"
        spec = DatasetSpec(sources=(), model_max_length=4096, root=root)
        pipeline = spec.pipeline(tokenizer, choose_template(None, tokenizer))
        samples = pipeline.parser.read(LocalFiles(path=data).objects()).samples
        texts = [render(sample, pipeline.template, tokenizer).text for sample in samples]
        del samples
        for number in range(1, options.rounds + 1):
            tokenise_s, tokens = tokenise_alone(texts, tokenizer, options.processes)
            start = time.monotonic()
            prepare_source(LocalFiles(path=data), pipeline, root, processes=options.processes)
            prepare_s = time.monotonic() - start
            shutil.rmtree(root)
            ratios.append(prepare_s / tokenise_s)
            sys.stdout.write(
                f"{number}/{options.rounds}: {options.samples:,} conversations of {tokens / options.samples:.0f} tokens, "
                f"{options.processes} processes: tokenizer alone {tokenise_s:.1f} s, whole preparation {prepare_s:.1f} s, "
                f"ratio {ratios[-1]:.2f}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"median ratio {statistics.median(ratios):.2f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
