"""The tokenizer of Stable Diffusion, from the vocabulary that OpenCLIP's package brings."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.metadata import distribution

from transformers import CLIPTokenizer

from training.networks import byte_alphabet

ENTRIES = 49_408


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE of 49,408 entries and 77 positions."""
    package = distribution("open_clip_torch")  # only its data: importing it asks for torchvision
    packed = package.locate_file("open_clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()
    alphabet = byte_alphabet()
    most = ENTRIES - 2 * len(alphabet) - 2
    lines = gzip.decompress(packed).decode().split("\n")[1 : most + 1]
    merges = [tuple(line.split()) for line in lines]
    tokens = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert len(tokens) == ENTRIES
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
