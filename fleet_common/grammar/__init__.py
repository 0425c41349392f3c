"""Grammars at both ends: which tokens may follow in a text that has one, and which must; over llguidance."""
