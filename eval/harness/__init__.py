"""lm-eval, with this library's models and remedies."""
