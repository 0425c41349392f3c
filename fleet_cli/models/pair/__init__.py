"""Pairs of a draft model and a target: whether they fit, what they need, and the target's vocabulary for the device."""
