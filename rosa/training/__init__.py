"""Data, methods, trainers and the training job."""
