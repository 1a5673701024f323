"""Writing a trained model to disk, and finding what a run can go on from."""
