"""The parts of the fine-tuning job: inputs, trainer, checkpoints, sample answers, and the log of the steps."""
