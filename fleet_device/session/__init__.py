"""Device's protocol state machine: no I/O, no clock."""
