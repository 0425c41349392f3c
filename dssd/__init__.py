"""Law of split speculative decoding, in plain numpy: no I/O, no threads, no state."""
