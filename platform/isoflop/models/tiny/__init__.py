"""The built-in tiny families: shapes, recipes and lessons of models that are trained on the spot."""
