"""Load a checkpoint into ZeRO-3 shards: `api` is the entrance, `sharded` the walk through a load."""
