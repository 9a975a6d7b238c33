"""Compression of the key-value cache, and attention that reads a part of it."""
