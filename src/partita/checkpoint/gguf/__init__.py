"""GGUF files, the form of llama.cpp: their header, and what it says as names, shapes and a config of Hugging Face."""
