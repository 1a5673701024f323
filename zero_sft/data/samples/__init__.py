"""From an object in a file to a sample: formats, keys, conversations."""
