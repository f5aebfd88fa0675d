"""Ternary products on a CPU, by C++ that is compiled where a C++ compiler is."""
