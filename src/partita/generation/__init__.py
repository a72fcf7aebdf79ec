"""What text generation needs on either engine: how tokens are chosen and told, ids and their text. No engine is loaded."""

from partita.generation.settings import Generation, OnText, Sampling, Sequence
from partita.generation.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

__all__ = ["Generation", "OnText", "Sampling", "Sequence", "Tokenizer", "byte_tokenizer", "load_tokenizer"]
