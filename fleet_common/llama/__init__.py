"""llama.cpp's library and GGUF files, as both ends use them."""
