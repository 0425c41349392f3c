"""llama.cpp verifier: a GGUF as target model, in-process, many sequences in one batch."""
