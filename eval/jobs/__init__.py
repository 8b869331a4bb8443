"""What reads models: losses over length, recall."""
