"""What a training script needs around the optimizer and the masks, one concern a file."""
