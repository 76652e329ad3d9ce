"""TODO policyfile."""
