"""Leaving experts of a mixture out, token by token."""
