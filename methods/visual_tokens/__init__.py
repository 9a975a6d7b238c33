"""Compressors of visual tokens between the vision tower and the language model."""
