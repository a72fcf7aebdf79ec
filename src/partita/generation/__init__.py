"""The parts of text generation that both engines share: choosing tokens, ids and their text. Imports no engine."""

from partita.generation.report import GenerationReport
from partita.generation.settings import Generation, OnText, Sampling, Sequence
from partita.generation.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

__all__ = [
    "Generation",
    "GenerationReport",
    "OnText",
    "Sampling",
    "Sequence",
    "Tokenizer",
    "byte_tokenizer",
    "load_tokenizer",
]
