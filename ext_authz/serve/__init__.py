"""The server process: its parts, epochs and workers, and the way of a new policy into force."""
