"""What reads tables of results; knows no torch."""
