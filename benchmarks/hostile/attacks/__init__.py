"""Attacks of one hostile device, each with a certificate of its own, on the broker and the edge of its fleet."""
