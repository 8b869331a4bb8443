"""The contracts that everything in a registry is held to, for files outside this repository too."""
