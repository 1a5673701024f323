"""What a person sees: the log, progress, and text that is safe to print."""
