"""Kernels for TPUs (Pallas Mosaic TPU), by the names and signatures of those in `hopper`."""
