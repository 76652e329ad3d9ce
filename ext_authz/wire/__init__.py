"""The only room that knows Envoy's messages: Check, ADS, clusters, the lease filter, the bootstrap file."""
