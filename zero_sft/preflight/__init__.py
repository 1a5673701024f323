"""Check a cluster before a run: what each node has, whether the nodes agree, and whether the ranks reach each other."""
