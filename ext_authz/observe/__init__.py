"""Counts, logs and reports of decisions."""
