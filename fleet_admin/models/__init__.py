"""Models: preparing the pair of the demo, and checking whether a draft model and a target fit."""
