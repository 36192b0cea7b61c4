"""What datasets and checkpoints share."""
