"""The conversion of a checkpoint's tensors to a model's, on names and shapes only. No I/O, no communication."""
