"""Self-tests of a device, and of an edge by a device."""
