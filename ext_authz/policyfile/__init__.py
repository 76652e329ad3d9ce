"""From policy text to `core.policy.Policy`, or to all its mistakes with line and column."""
