"""Repair: a little that is learned beside a compressed model, whose weights stay as they are."""
