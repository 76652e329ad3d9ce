"""What SRP costs and how well it balances, measured. Run one from the repository's root: `python -m benchmarks.check`."""
