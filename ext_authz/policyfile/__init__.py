"""Policy text to `core.policy.Policy`, or every mistake of it with line and column."""
