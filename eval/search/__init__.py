"""Settings searched for a remedy, and the check that what was searched on is not evaluated on."""
