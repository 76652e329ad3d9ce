"""The demo: the whole proxy on loopback, with its own keys and tokens."""
