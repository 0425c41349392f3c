"""A whole fleet on one machine: a broker, an edge and devices, each a process of its own."""
