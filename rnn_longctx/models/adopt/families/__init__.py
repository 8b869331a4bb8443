"""One file a family of mixers of other libraries."""
