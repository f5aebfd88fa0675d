"""From files to a checked table of runs."""
