"""Estimate the needs of loading and training without starting a job, by running the real planner for every rank on headers.

    python -m zero_sft.estimate --model_name_or_path Llama-3.1-70B --world_size 64 --ranks_per_node 8

`model` finds the model and its headers, `simulate` plans the reads of every rank, `activations` and `engine_memory` count
memory, and `memory_needs` finds out what would fit. This package reads no weights, starts no ranks and uses no device.
"""
