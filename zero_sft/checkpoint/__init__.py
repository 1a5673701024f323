"""What is on disk: headers and the index over them. Pure, standard library only."""
