"""Engine for processors: weights in blocks of 32, as GGUF files hold them."""
