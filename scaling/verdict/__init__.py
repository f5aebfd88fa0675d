"""Which family wins, where, at which cost, and which ladder would decide it."""
