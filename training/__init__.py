"""What `train_hf.py` puts together: checks of arguments, the run's folder and its checkpoints, and how a run ends."""
