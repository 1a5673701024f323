"""Estimate the memory of the training that `benchmarks.gpu.train` measures, as `python -m zero_sft.estimate` does."""

import time

from benchmarks.gpu.settings import Settings, keep


def main() -> None:
    """Save the estimate of each component."""
    from zero_sft.estimate.memory_needs import RUNTIME_BYTES, MemoryModel, TrainingRun
    from zero_sft.estimate.model import find_model
    from zero_sft.hub.options import HubOptions

    settings = Settings.read()
    start = time.perf_counter()
    model = find_model(str(settings.folder), HubOptions())
    run = TrainingRun(
        world_size=1, ranks_per_node=1, ds_config="zero3", batch_size=1, length=settings.length, checkpointing=True,
        packing=True, device_bytes=80 * 2**30, host_bytes=128 * 2**30,
    )  # fmt: skip
    needs = MemoryModel(model).needs(run)
    keep("memory", {
        "device": dict(needs.memory.device), "phases": {name: dict(parts) for name, parts in needs.memory.phases.items()},
        "longest_phase": needs.memory.longest_phase, "device_peak": needs.memory.device_peak, "runtime": RUNTIME_BYTES,
        "seconds": time.perf_counter() - start, "parameters": model.numel,
    })  # fmt: skip


if __name__ == "__main__":
    main()
