"""Bytes in and out: the memory of the shards, positioned reads into it and positioned writes from it."""
