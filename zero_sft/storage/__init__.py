"""Bytes in and out: the memory of the shards, positioned reads and writes, and the headers of `.bin` files."""
