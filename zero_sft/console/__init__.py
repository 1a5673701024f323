"""Output for the user: log, progress and plots."""
