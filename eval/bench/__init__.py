"""Measurements of speed and memory, one file each or several."""
