"""Training: state, the pure update, the loop, warm-up and reference, checkpoints, metrics."""
