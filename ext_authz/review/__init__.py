"""What people do with a policy before and after it is live: explain, test, diff, replay, shadow."""
