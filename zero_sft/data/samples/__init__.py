"""Parse the objects of a file into samples: formats, keys, conversations."""
