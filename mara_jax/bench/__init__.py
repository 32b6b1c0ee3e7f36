"""How fast a training step is on this machine."""
