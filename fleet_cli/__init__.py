"""The `fleet` command and the demo; either end is imported only when asked for."""
