"""Hand-written kernels for Hopper GPUs (Pallas Mosaic GPU), one file an op. `choice` alone decides where they serve and
XLA computes the same elsewhere, so nothing needs a kernel to work. `mosaic` says in short how such kernels read."""
