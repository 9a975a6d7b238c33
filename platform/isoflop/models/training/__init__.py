"""Training: the loop that every trained stage runs, its schedules, and data-parallel training."""
