"""Methods, trainers and the training job."""
