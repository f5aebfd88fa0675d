"""Faster implementations of the ops, and the choice among them. `choice` decides which implementation serves; `checks`
compares a kernel with a float64 reference on this device."""
