"""One file a mixer, recurrent or attending."""
