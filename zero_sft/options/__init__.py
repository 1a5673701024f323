"""Options declared once, as dataclass fields, and read from a command line, a file or keyword arguments."""
