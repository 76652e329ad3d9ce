"""The server process: the Check service, its workers, and how a new policy comes into force."""
