"""Gradient compression: what data-parallel workers send each other in place of whole gradients."""
