"""Discrete-event simulation of an edge and the devices that write over it."""
