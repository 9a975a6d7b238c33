"""Worlds: what tiny models are trained on and judged by; made here, or text that every Python carries."""
