"""Hand-written kernels (Pallas Mosaic GPU, Hopper), one file an op. Each stands beside an XLA reference in ops/ that it
is tested against, and is only reached through that op's choosing function: nothing needs a kernel to work."""
