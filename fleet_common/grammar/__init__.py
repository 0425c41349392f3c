"""Grammars at both ends, with llguidance: which tokens may follow in a generation, and which must."""
