"""KL-regularised reinforcement learning that keeps every good answer."""
