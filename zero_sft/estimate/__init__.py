"""What a load and a training will need, before anything is started: the real planner, played for every rank on headers alone.

    python -m zero_sft.estimate --model_name_or_path Llama-3.1-70B --world_size 64 --ranks_per_node 8

`model` finds the model and its headers, `simulate` plans every rank's reads, `activations` and `engine_memory` count memory,
`memory_needs` says what would fit. Nothing here reads a weight, starts a rank or touches a device.
"""
