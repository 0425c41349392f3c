"""Draft models behind one interface: llama.cpp, suffixes, scripts; finding and opening their files."""
