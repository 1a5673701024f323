"""Ranks in processes, and probes of memory and traffic: for tests and benchmarks alike."""
