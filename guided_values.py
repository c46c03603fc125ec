"""Values whose schema the slot grammar cannot guarantee, under the guidance of llguidance instead.

Takes a leaf of kind `"guided"` and gives an automaton with the interface of `slot_grammar.TokenAutomaton`, whose states
are llguidance matchers. Asked for by `on_unsupported="ar"`; llguidance is imported when the first such value comes up.
"""

import json
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .schema_algebra import UnsupportedSchemaError
from .schema_scaffold import Leaf
from .slot_grammar import Vocabulary

# What may close a value: without room for more, nothing else is taken while one of these is allowed.
_CLOSING = [bytes([code]) for code in b'"}]']


class GuidedAutomaton:
    """A guided value, start state 0. States are made as they are reached and kept while the automaton is.

    Args:
        vocabulary: the tokens.
        tool: name of the tool, for errors.
        leaf: the value.

    Raises:
        ImportError: llguidance is not installed.
        UnsupportedSchemaError: llguidance does not support the schema either.
    """

    def __init__(self, vocabulary: Vocabulary, tool: str, leaf: Leaf) -> None:
        llguidance = _llguidance()
        self._vocabulary = vocabulary
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(leaf.guide, overrides=options)
        matcher = llguidance.LLMatcher(_tokens_of(vocabulary), grammar)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise UnsupportedSchemaError(tool, leaf.path, "schema", f"llguidance cannot guide it either: {reason}")
        self._matchers = [matcher]
        self._steps: dict[tuple[int, int], int] = {}
        self._masks: dict[int, Tensor] = {}
        closing = [index for index, spelled in enumerate(vocabulary.bytes) if spelled in _CLOSING]
        self._closing = torch.zeros(vocabulary.size, dtype=torch.bool, device=vocabulary.device)
        self._closing[closing] = True

    def accepts(self, state: int) -> bool:
        """Whether a value may end in a state."""
        return bool(self._matchers[state].is_accepting())

    def step(self, state: int, token: int) -> tuple[int, int]:
        """The state behind one more token, or -1; characters are not counted."""
        key = (state, token)
        if key not in self._steps:
            matcher = self._matchers[state].deep_copy()
            if matcher.try_consume_tokens([token]) != 1:
                return -1, 0
            self._steps[key] = len(self._matchers)
            self._matchers.append(matcher)
        return self._steps[key], 0

    def allowed(self, state: int, room: int, chars_left: int | None) -> Tensor:
        """bool [vocab]: tokens that may come next; without room only those that close, where there are any."""
        if state not in self._masks:
            words = np.frombuffer(self._matchers[state].compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(words, bitorder="little")[: self._vocabulary.size].astype(bool)
            spelled = np.array([token is not None for token in self._vocabulary.bytes])
            self._masks[state] = torch.from_numpy(bits & spelled).to(self._vocabulary.device)
        mask = self._masks[state]
        closing = mask & self._closing
        return closing if room <= 0 and bool(closing.any()) else mask


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError('on_unsupported="ar" needs llguidance: pip install llguidance.') from error
    return llguidance


def _tokens_of(vocabulary: Vocabulary) -> Any:
    """The vocabulary as llguidance sees it; made once."""
    if vocabulary not in _known:
        tokenizer = json.loads(vocabulary.tokenizer.backend_tokenizer.to_str())
        # The normalizer only undoes the escapes of prompts.
        text = json.dumps({**tokenizer, "normalizer": None, "padding": None, "truncation": None})
        _known[vocabulary] = _llguidance().LLTokenizer(text, n_vocab=vocabulary.size, eos_token=vocabulary.im_end)
    return _known[vocabulary]


_known: WeakKeyDictionary[Vocabulary, Any] = WeakKeyDictionary()
