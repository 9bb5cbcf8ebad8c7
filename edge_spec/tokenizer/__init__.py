"""Text to token ids and back, with the vocabulary that a GGUF file carries; ids equal llama.cpp's."""

from edge_spec.tokenizer.compare import check_same_vocabulary
from edge_spec.tokenizer.detokenizer import Detokenizer
from edge_spec.tokenizer.tokenizer import Tokenizer
from edge_spec.tokenizer.vocabulary import TokenKind, Vocabulary

__all__ = ["Detokenizer", "TokenKind", "Tokenizer", "Vocabulary", "check_same_vocabulary"]
