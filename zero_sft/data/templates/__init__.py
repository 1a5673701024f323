"""Render samples as text with chat templates, and mark the characters that are trained on."""
