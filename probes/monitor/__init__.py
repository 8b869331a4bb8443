"""A watch over the states of a model in use."""
