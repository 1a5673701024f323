"""The benchmarks, as far as tests can hold them: they run."""
