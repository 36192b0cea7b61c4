"""From a checkpoint to an inference endpoint that answers."""
