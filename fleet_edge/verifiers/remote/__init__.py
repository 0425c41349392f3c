"""Remote verifier: the target model on inference servers (vLLM, SGLang), which may span GPUs and machines."""
