"""Where a model's files come from: options of the hub, a source that is located once per run, downloads."""
