"""Sources of samples: the paths that the user names, local files and folders, datasets on the hub."""
