"""A page about runs, from their log folders: `python -m zero_sft.report RUN [RUN ...]`."""
