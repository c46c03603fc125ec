"""A tokenizer of our kind with a tiny vocabulary, trained in milliseconds, and what is compiled for it."""

from functools import cache
from typing import Any

from repo_package import load_repo_module

_TEXTS = (
    '{"name": "get_weather", "arguments": {"city": "New York", "days": 3, "unit": "celsius", "ok": true, "x": null}}',
    "What is the weather in Paris, the city of light? It is 12.5 degrees and 100 false alarms.",
    "é🙂 café naïve 🙂🙂 日本語 日本",  # merges whole characters and, among emoji, parts of them
    '", "', '": "', '"}}\n', '"], "', '", "arguments": {"',
)  # fmt: skip


@cache
def tiny_tokenizer() -> Any:
    """About 380 tokens: all bytes, some words and punctuation, the special tokens."""
    return load_repo_module("tokenization_utils").train_tokenizer(list(_TEXTS) * 5, vocab_size=380)


@cache
def tiny_vocabulary() -> Any:
    """The tokenizer as bytes, for a model with three unused ids."""
    tokenizer = tiny_tokenizer()
    return load_repo_module("slot_grammar").Vocabulary(tokenizer, len(tokenizer) + 3)
