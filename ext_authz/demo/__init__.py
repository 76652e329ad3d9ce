"""The whole proxy on loopback, with keys and tokens of its own."""
