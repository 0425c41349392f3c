"""Draft models behind one interface: llama.cpp, prompt lookup, scripts; finding and opening their files."""
