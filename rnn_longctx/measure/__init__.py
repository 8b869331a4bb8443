"""What both remedies and probes need of a model: losses over a stream, answers, envelopes of its states, its steps."""
