"""Who may reach which expert: pure, synchronous, no I/O, no clock, no log, no Envoy. Time comes in as a value."""
