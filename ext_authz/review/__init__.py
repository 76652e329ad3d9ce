"""TODO review."""
