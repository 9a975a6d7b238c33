"""Leaving neurons of the feed-forward blocks out, token by token."""
