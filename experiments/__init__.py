"""Experiments: train small models from scratch, judge them, compare them. Hydra and W&B live here and nowhere else."""
