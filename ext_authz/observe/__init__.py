"""What is counted, logged and reported of decisions."""
