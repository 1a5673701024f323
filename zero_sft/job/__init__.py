"""The fine-tuning job's own parts: the log of its steps, and how progress is shown."""
