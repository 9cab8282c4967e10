"""GGUF files, for llama.cpp and programs based on it."""
