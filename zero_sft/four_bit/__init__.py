"""Linear modules whose weights are stored in 4 bits (QLoRA), sharded as bytes."""
