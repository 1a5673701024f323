"""Tests that need a device: `make test-gpu`.

Each test starts processes that import everything and start CUDA, some seconds each, so a test walks over its cases inside one
process and names those that failed.
"""
