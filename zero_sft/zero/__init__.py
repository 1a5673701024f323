"""The only folder that uses DeepSpeed's internals."""
