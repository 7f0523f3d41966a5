"""The training step, the loop around it, and everything that changes while a network trains."""
