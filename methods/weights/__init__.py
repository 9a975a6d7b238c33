"""Compression of a model's weight matrices."""
