"""What text generation needs on either engine: how tokens are chosen and told, ids and their text. No engine is loaded."""

from partita.text.sampling import Generation, OnText, Sampling, Sequence
from partita.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

__all__ = ["Generation", "OnText", "Sampling", "Sequence", "Tokenizer", "byte_tokenizer", "load_tokenizer"]
