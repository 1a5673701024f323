"""How much longer preparing data takes than tokenising alone: `python -m benchmarks.prepare --model <folder>`.

Conversations are put together from the shipped ones, some 700 tokens each. The measure is `tokenizer(texts)` on the
rendered texts, in as many processes, started as this package's are; against it stands the whole preparation: reading,
rendering, tokenising, labels, and rows on disk. Turns are taken round by round; ratios are within a round.
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

from zero_sft.data.dataset import make_pipeline, prepare_source
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.templates.choose import choose_template, render
from zero_sft.data.workers import AT_ONCE, usable_processes
from zero_sft.shipped import shipped

TOKENS = 700


def conversations(count: int, path: Path, tokenizer: Any) -> None:
    """Write `count` conversations of several rounds, `TOKENS` tokens on average, as JSON lines."""
    shipped_ones = json.loads(shipped("examples", "conversations.json").read_text(encoding="utf-8"))
    rounds = [each["conversations"][:2] for each in shipped_ones]
    mean = statistics.mean(len(tokenizer(f"{asked['value']}{told['value']}")["input_ids"]) + 10 for asked, told in rounds)
    chance = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            chosen = chance.choices(rounds, k=max(1, round(chance.uniform(0.2, 1.8) * TOKENS / mean)))
            turns = [turn for each in chosen for turn in each]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")


_tokenizer: Any = None


def _start(tokenizer: Any) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = tokenizer


def _tokenise(texts: list[str]) -> int:
    return sum(map(len, _tokenizer(texts, add_special_tokens=False)["input_ids"]))


def tokenise_alone(texts: list[str], tokenizer: Any, processes: int) -> tuple[float, int]:
    """Seconds of `tokenizer(texts)` in processes of their own, and the number of tokens."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer,)) as pool:
        tokens = sum(pool.map(_tokenise, [texts[n : n + AT_ONCE] for n in range(0, len(texts), AT_ONCE)]))
    return time.monotonic() - start, tokens


def main() -> int:
    """Measure, and print a line a round."""
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
        pipeline = make_pipeline(tokenizer, choose_template(None, tokenizer), model_max_length=4096)
        samples = pipeline.reader.read(LocalFiles(path=data).objects()).samples
        texts = [render(each, pipeline.template, tokenizer).text for each in samples]
        del samples
        for number in range(1, options.rounds + 1):
            alone, tokens = tokenise_alone(texts, tokenizer, options.processes)
            root, start = Path(top) / "cache", time.monotonic()
            prepare_source(LocalFiles(path=data), pipeline, processes=options.processes, root=root)
            whole = time.monotonic() - start
            shutil.rmtree(root)
            ratios.append(whole / alone)
            sys.stdout.write(
                f"{number}/{options.rounds}: {options.samples:,} conversations of {tokens / options.samples:.0f} tokens, "
                f"{options.processes} processes: tokenizer alone {alone:.1f} s, whole {whole:.1f} s, {ratios[-1]:.2f} times\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"median {statistics.median(ratios):.2f} times\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
