"""Who may reach which expert. Pure and synchronous: no I/O, clock, log or Envoy. Time is passed in as a value."""
