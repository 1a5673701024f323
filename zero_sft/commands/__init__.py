"""The commands next to the training job, which take its options under the same names: `estimate`, `data`."""
