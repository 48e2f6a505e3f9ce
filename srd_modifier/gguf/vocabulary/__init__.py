"""The vocabulary of a GGUF file: what llama.cpp needs to tokenize as the Hugging Face tokenizer does.

tokens        texts, types, merges and scores, out of the tokenizer as Transformers loads it
special       ids with a meaning, what is added around a text, the chat template
schemes       llama.cpp's tokenizers and pre-tokenizers that may do the same, likeliest first
verification  llama.cpp itself says which of them does; differences that it always has are told, not hidden
"""

from srd_modifier.gguf.vocabulary.reading import read_vocabulary
from srd_modifier.gguf.vocabulary.vocabulary import Vocabulary

__all__ = ["Vocabulary", "read_vocabulary"]
