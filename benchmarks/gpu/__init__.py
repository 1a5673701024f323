"""Benchmark one GPU in minutes: tests, loads against pinned copies, training against TRL, memory against the estimate.

    python -m benchmarks.gpu --write docs/gpu.md        # make bench-gpu
    python -m benchmarks.gpu --dry_run                  # every part that a CPU can do, with a tiny model

A machine with a GPU is often available only for minutes, and its setup is unknown. So each part runs in separate processes with
a time limit, writes its results as it goes, and does not affect the other parts when it fails. Nothing is downloaded: the
benchmark creates a model with random weights.
"""
