"""What trains a model: losses, optimizer, steps, checkpoints, metrics and the loop."""
