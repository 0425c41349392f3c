"""Remote verifier: the target model on inference servers (vLLM), which may span GPUs and machines."""
