"""What a load and a training will need, before anything is started: the real planner, played for every rank on headers alone.

    python -m zero_sft.estimate --model Llama-3.1-70B --world_size 64 --ranks_per_node 8

`subject` finds the model and its headers, `loading` plays the ranks, `activations` and `training` count memory, `advice` says
what would fit. Nothing here reads a weight, starts a rank or touches a device.
"""
