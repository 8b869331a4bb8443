"""The kinds of folder that a report can be made of, one file a kind."""
