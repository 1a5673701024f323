"""Commands in addition to the training job, with the same option names: `estimate` and `data`."""
