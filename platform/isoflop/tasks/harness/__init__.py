"""Benchmarks of other people's harnesses, run on models of this platform."""
