"""Numerics. Each op is a plain XLA reference, faster forms beside it, and one function that chooses among them."""
