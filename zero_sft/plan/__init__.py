"""The plan of a load: the byte ranges that each rank reads. Pure functions, standard library only, the same on every rank."""
