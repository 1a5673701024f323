"""Where samples come from: paths, files, folders, datasets of the hub."""
