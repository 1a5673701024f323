"""The public functions that return a model, and the methods that the model has."""
