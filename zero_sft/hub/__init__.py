"""Locate and download a model's files: hub options, a source that is located once per run, downloads."""
