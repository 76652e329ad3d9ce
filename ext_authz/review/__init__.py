"""Tools for policies before and after they are live: explain, test, diff, replay, shadow."""
