"""Load a checkpoint into ZeRO-3 shards: `api` holds the public functions, `sharded` the phases of a load."""
