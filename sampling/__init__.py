"""Sampling mathematics of split speculative decoding in plain numpy: no I/O, threads or state."""
