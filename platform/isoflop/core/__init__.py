"""Foundations that every other room may import: errors, hashing, registries, knobs, stages, expressions."""
