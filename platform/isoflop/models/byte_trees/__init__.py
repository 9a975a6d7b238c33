"""Probabilities of bytes from a model over tokens: byte vocabularies, segmentations, covering trees."""
