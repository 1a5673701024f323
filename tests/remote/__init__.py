"""Files at URLs, from servers on loopback."""
