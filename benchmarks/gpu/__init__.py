"""A benchmark of minutes on one GPU: tests, loads next to pinned copies, training next to TRL, memory next to the estimate.

    python -m benchmarks.gpu --write docs/gpu.md        # make bench-gpu
    python -m benchmarks.gpu --dry_run                  # every part that a CPU can do, tiny

A machine with a GPU is often there for minutes, and nobody has seen it before. So each part runs in its own processes with its
own time limit, writes what it has found as it goes, and leaves the others alone when it fails. Nothing is downloaded: the model
has random weights and is made on the spot.
"""
