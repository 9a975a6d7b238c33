"""Sweeps: from a YAML file to jobs, results, laws and frontiers. The only room that knows everybody."""
