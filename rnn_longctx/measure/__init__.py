"""What both remedies and probes need of a model: envelopes of its states, its steps."""
