"""Faster implementations of the ops by the same names. `choice` decides which serves, `verification` and `checks`
compare kernels with float64 on this device, `hopper` holds the kernels."""
