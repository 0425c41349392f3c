"""Packed verifier: one forward pass over the new tokens of all sequences, in torch."""
