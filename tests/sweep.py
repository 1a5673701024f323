"""Check every causal LM type of transformers: `python -m tests.sweep [--write FILE] [type ...]`.

For each type, a tiny random checkpoint is loaded on 2 and on 3 ranks in bf16 and in fp32. Every parameter, every buffer, and
the reported missing and unexpected names must equal those of plain `from_pretrained`. An export must equal that of plain
`save_pretrained`. A bf16 engine is compared with the reference cast to bf16, an fp32 engine with the reference itself. Warm
ranks check the types in batches. A batch that dies or hangs is repeated type by type, so that one type never hides another.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from testing.runner import run_ranks
from tests import architectures

WORLD_SIZES = (2, 3)
DTYPES = ("bfloat16", "float32")
BATCH = 16
WHOLE = " (whole checkpoint)"
"""The suffix for a composite type's checkpoint with its towers, of which the causal LM loads the text part."""


def cases() -> list[str]:
    """Return every type that can be built, and composite types a second time with their towers."""
    types = [each for each in architectures.CAUSAL_TYPES if each not in architectures.NOT_BUILDABLE]
    return types + [each + WHOLE for each in architectures.COMPOSITE_TYPES]


def save(case: str, folder: Path) -> Path:
    """Save the checkpoint of one case."""
    return architectures.save(case.removesuffix(WHOLE), folder / case.replace(" ", "_"), towers=case.endswith(WHOLE))


def check_batch(folders: dict[str, str], results: str) -> None:
    """Load each checkpoint and compare; rank 0 writes one JSON file with verdicts per case. Every rank; communicates."""
    from zero_sft.cluster.control_group import all_gather_json
    from zero_sft.cluster.world import World

    world = World.detect()
    for case, folder in folders.items():
        rows = []
        for dtype in DTYPES:
            mine = _check(Path(folder), dtype)
            everyone = all_gather_json(world, mine["problem"])
            problem = next((f"rank {rank}: {each}" for rank, each in enumerate(everyone) if each), "")
            rows.append({**mine, "problem": problem})
            gc.collect()
        if world.is_main:
            path = Path(results) / f"{case.replace(' ', '_')}.{world.world_size}.json"
            path.write_text(json.dumps({"case": case, "world_size": world.world_size, "rows": rows}))


def _check(folder: Path, dtype: str) -> dict[str, Any]:
    """Compare one load with plain loading; differences go into `problem`. Every rank; communicates."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests import models
    from zero_sft import load_model

    row: dict[str, Any] = {"dtype": dtype, "problem": "", "operations": [], "cast": 0, "pieces": 0}
    try:
        wanted = getattr(torch, dtype)
        reference, info = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, output_loading_info=True)
        with torch.device("meta"):
            fresh = type(reference)(reference.config)
        trainable = {name: param.requires_grad for name, param in fresh.named_parameters(remove_duplicate=False)}
        model = load_model(str(folder), ds_config=models.zero3(bf16=dtype == "bfloat16"), dtype=wanted)
        report = model.load_report
        row |= {"operations": report.operations, "cast": len(report.cast_keys), "pieces": report.requests}
        models.assert_equal(model, reference, cast=wanted if dtype == "bfloat16" else None, trainable=trainable)
        if dtype == "float32":
            _check_export(model, reference, folder.with_name(f"{folder.name}.out"))
        for kind in ("missing", "unexpected"):
            found, expected = getattr(report, f"{kind}_keys"), sorted(info[f"{kind}_keys"])
            assert found == expected, f"{kind}: {found[:3]} instead of {expected[:3]}"
    except Exception as error:  # an error is the type's verdict and must not end the sweep
        row["problem"] = f"{type(error).__name__}: {error}"[:600]
    return row


def _check_export(model: Any, reference: Any, out: Path) -> None:
    """Export, and compare each file with the one that plain `save_pretrained` writes. Every rank; communicates."""
    import shutil

    import torch
    from safetensors.torch import load_file

    from zero_sft import save_pretrained
    from zero_sft.cluster.world import World

    save_pretrained(model, out)
    if not World.detect().is_main:
        return
    plain = out.with_suffix(".plain")
    reference.save_pretrained(plain)
    found, expected = (load_file(each / "model.safetensors") for each in (out, plain))
    for folder in (out, plain):
        shutil.rmtree(folder)
    assert found.keys() == expected.keys(), f"export: {sorted(found.keys() ^ expected.keys())[:4]}"
    different = [
        name for name in found if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
    ]
    assert not different, f"export: {different[:4]}"


def run(chosen: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the verdicts of all cases, with one row per world size and dtype."""
    verdicts: dict[str, list[dict[str, Any]]] = {case: [] for case in chosen}
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            folders = {case: str(save(case, Path(scratch))) for case in batch}
            for size in WORLD_SIZES:
                for case, rows in _run_batch(folders, size, scratch).items():
                    verdicts[case] += rows
            for case in batch:
                for row in [row for row in verdicts[case] if row["problem"]][:2]:
                    sys.stdout.write(f"{case}, {row['world_size']} ranks, {row['dtype']}: {row['problem']}\n")
            sys.stdout.write(f"{start + len(batch)} of {len(chosen)}\n")
            sys.stdout.flush()
    return verdicts


def _run_batch(folders: dict[str, str], size: int, scratch: str) -> dict[str, list[dict[str, Any]]]:
    results = Path(scratch) / f"results{size}"
    results.mkdir(exist_ok=True)
    failure = ""
    try:
        run_ranks(size, check_batch, {"folders": folders, "results": str(results)}, timeout_s=60.0 + 4 * len(folders))
    except AssertionError as error:
        failure = str(error)
    found = {}
    for case in folders:
        path = results / f"{case.replace(' ', '_')}.{size}.json"
        if path.exists():
            found[case] = [{**row, "world_size": size} for row in json.loads(path.read_text())["rows"]]
    left = {case: folder for case, folder in folders.items() if case not in found}
    if len(left) == len(folders) == 1:
        case = next(iter(left))
        return {case: [{"dtype": "", "problem": failure[-600:], "operations": [], "cast": 0, "pieces": 0, "world_size": size}]}
    for case, folder in left.items():
        found |= _run_batch({case: folder}, size, scratch)
    return found


def table(verdicts: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results as a Markdown table."""
    import transformers

    failed = [case for case, rows in verdicts.items() if any(row["problem"] for row in rows)]
    lines = [
        "# Architectures",
        "",
        f"Written by `make test-arch`: every causal LM type of transformers {transformers.__version__}, a tiny randomised",
        "checkpoint each, loaded on 2 and on 3 ranks. Every parameter and buffer, and the names reported as missing or",
        "unexpected, are compared with plain `from_pretrained`: cast to bf16 under a bf16 engine, and as they are, dtype too,",
        "under an fp32 engine; and what is exported with what plain `save_pretrained` writes. *Pieces* are the reads of rank 0",
        "of 2; *cast* counts tensors stored in another dtype than they are loaded in.",
        "",
        f"**{len(verdicts) - len(failed)} of {len(verdicts)} equal.** Types marked *whole checkpoint* are published with",
        "vision or audio towers, of which the causal LM takes the text part.",
        "",
        "| type | operations | pieces | cast | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case, rows in sorted(verdicts.items()):
        problems = [f"{row['world_size']} ranks, {row['dtype']}: {row['problem']}" for row in rows if row["problem"]]
        verdict = "equal" if not problems else problems[0].replace("\n", " ").replace("|", "\\|")[:200]
        operations = ", ".join(rows[0]["operations"]) or "-"
        lines.append(f"| {case} | {operations} | {rows[0]['pieces']} | {rows[0]['cast']} | {verdict} |")
    lines += ["", "Not built, since transformers can't make them offline:", ""]
    lines += [f"- {name}: {reason}" for name, reason in architectures.NOT_BUILDABLE.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sweep; return 1 if a type fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("types", nargs="*", help="only these (all)")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if not arguments.types or case.removesuffix(WHOLE) in arguments.types]
    if not chosen:
        sys.stderr.write(f"no such type: {', '.join(arguments.types)}\n")
        return 2
    start = time.monotonic()
    verdicts = run(chosen)
    if arguments.write:
        arguments.write.write_text(table(verdicts), encoding="utf-8")
    failed = [case for case, rows in verdicts.items() if any(row["problem"] for row in rows)]
    sys.stdout.write(f"{len(verdicts) - len(failed)} of {len(verdicts)} equal in {time.monotonic() - start:.0f} s\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
