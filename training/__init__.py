"""What `train_hf.py` puts together: arguments, rows, batches, the trainer, a run's folder and checkpoints, results."""
