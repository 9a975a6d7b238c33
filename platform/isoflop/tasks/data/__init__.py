"""Tasks on data that a user brings: files, folders, and data sets of a hub."""
