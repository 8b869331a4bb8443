"""Models of other libraries behind this library's interface."""
