"""Hooks: the places in a model where methods act, a file each."""
