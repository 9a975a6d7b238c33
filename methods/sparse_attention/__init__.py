"""Sparse decoding: the whole cache stays, each step reads a part of it."""
