"""From a sample to text: chat templates, and which characters the model has to write."""
