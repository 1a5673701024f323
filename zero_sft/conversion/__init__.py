"""Which source elements make which parameter. Names and shapes only: no I/O, no collectives."""
