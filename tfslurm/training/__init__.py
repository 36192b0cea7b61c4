"""From a sealed dataset and six numbers to a verified adapter."""
