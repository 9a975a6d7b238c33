"""Dropping visual tokens between the decoder's layers."""
