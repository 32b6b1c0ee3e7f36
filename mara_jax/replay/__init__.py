"""A step of a run once more, from its stored batch and the checkpoint before it, compared with what the run wrote."""
