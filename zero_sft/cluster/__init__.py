"""The ranks: where they run, how they talk to each other on the CPU, and how a job of them ends."""
