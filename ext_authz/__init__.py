"""The Secure Routing Proxy's decision server, beside Envoy."""

__version__ = "0.1.0"
