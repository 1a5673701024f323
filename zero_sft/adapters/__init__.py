"""Train low-rank adapters (LoRA) on a sharded base model, with PEFT."""
