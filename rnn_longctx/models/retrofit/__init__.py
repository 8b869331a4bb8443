"""Attention of a transformers decoder replaced, layer by layer and head by head, by this library's mixers."""
