"""The conversion of a checkpoint's tensors to a model's, on names and shapes or on data. No I/O, no communication."""
