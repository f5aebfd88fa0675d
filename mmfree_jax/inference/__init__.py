"""Models that serve: packed weights, prefill, decoding with a state of constant size, sampling."""
