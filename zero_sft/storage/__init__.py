"""Bytes in and out: the memory that shards live in, positioned reads into it, positioned writes out of it."""
