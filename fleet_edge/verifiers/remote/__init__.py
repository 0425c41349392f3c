"""Remote verifier: the target model on inference servers (vLLM, SGLang) that may span GPUs and machines."""
