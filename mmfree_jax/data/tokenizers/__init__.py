"""Tokenizers: bytes, byte-level BPE (trained here), and SentencePiece models."""
