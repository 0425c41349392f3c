"""Sessions at the edge: the protocol state machine, the session table, and what is granted."""
