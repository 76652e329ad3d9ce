"""Measure what SRP costs and how well it balances. Run one from the repository root: `python -m benchmarks.check`."""
