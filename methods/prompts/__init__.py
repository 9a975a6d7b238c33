"""Compression of the text of a prompt, before a reader sees it."""
