"""Faults on purpose: hostile files, killed ranks, full disks. `python -m tests.faults` runs more of them, and reports."""
