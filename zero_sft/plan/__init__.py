"""Who reads which bytes. Pure functions from data to data, standard library only, the same on every rank."""
