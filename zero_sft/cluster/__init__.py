"""Ranks of a job: their layout on nodes, their CPU communication, and their joint success or failure."""
