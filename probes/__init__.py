"""What the state of a model does while it reads."""
