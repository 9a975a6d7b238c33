"""Checkpoints in Hugging Face's form: where their files lie, what is known of them, how they are loaded."""
