"""Write a trained model to disk, and find the checkpoint from which a run resumes."""
