"""Export the weights of checkpoints to a model folder, in one process and with one tensor in memory at a time."""
