"""Draws of what two laws and their misfit may be, and every statement that is read from them."""
