"""The checkpoint format: file headers, and the index over all files of a folder. Standard library only."""
