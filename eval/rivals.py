"""Constrained decoding with public engines over a plain base: what our decodings are compared with.

Takes a causal language model of transformers, a prompt that ends where the arguments of a call begin, and their JSON
Schema; gives the tokens of the arguments. Knows no head, no scaffold and nothing of our grammar.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from eval.schema_coverage import LLGUIDANCE_OPTIONS, Refused

LOOK_UP_TOKENS = 10
"""Most tokens that one look-up proposes; the number that transformers' documentation uses."""
LOOK_UP_GRAM = 2
"""Longest stretch of tokens that is looked up; transformers' default."""

Encode = Callable[[str], Sequence[int]]
Chooser = Callable[[Tensor, Tensor, Sequence[int]], int]
"""Logits [vocab], allowed tokens bool [vocab], the tokens written so far -> the next token."""


# ---------------------------------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------------------------------


class Constraint(Protocol):
    """The arguments of one call while they are written, as an engine sees them."""

    @property
    def complete(self) -> bool:
        """Whether the arguments are finished: nothing but the closing of the call can follow."""
        ...

    def allowed(self) -> Tensor:
        """bool [vocab]: tokens that may come next; only the end token where the arguments are finished."""
        ...

    def accept(self, tokens: Sequence[int]) -> int:
        """Take the longest prefix of `tokens` that is allowed, up to where all is finished; returns its length."""
        ...

    def take_back(self, count: int) -> None:
        """Forget the last tokens."""
        ...

    def forced(self) -> list[int]:
        """Tokens of the text that the engine knows must come next."""
        ...


Compiled = Callable[[], Constraint]
"""A compiled call: begins anew behind its opening."""


class Engine(Protocol):
    """An engine over one tokenizer. Its grammar is that of a whole call, line breaks included, because a base that was
    trained on calls closes both objects by one token."""

    def compile(self, name: str, parameters: Mapping[str, Any], opening: Sequence[int]) -> Compiled:
        """Compile the grammar of a call.

        Args:
            name: of the tool.
            parameters: JSON Schema of its arguments.
            opening: tokens of the call from the line break behind `<tool_call>` up to its arguments.

        Raises:
            Refused: the engine does not support the schema.
        """
        ...


def call_schema(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema of a whole call with the given name."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": closed(parameters)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def closed(schema: Any) -> Any:
    """A schema whose objects take declared properties alone, as our grammar reads it and as xgrammar's default does.

    Args:
        schema: JSON Schema. What stands below `allOf` stays as it is, where closing one part contradicts another.
    """
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            schema[keyword] = {name: closed(inner) for name, inner in schema[keyword].items()}
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(keyword), list):
            schema[keyword] = [closed(inner) for inner in schema[keyword]]
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    if isinstance(schema.get("properties"), dict) and "patternProperties" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


# What the engine may know to follow where the arguments are finished.
_CLOSINGS = ("\n", "}\n")


class Llguidance:
    """llguidance, which says itself which tokens are forced.

    Args:
        tokenizer: the base's tokenizer.
        size: width of the base's logits.
        encode: not used: the engine has the tokenizer itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, encode: Encode) -> None:
        from llguidance.hf import from_tokenizer

        self.tokens = from_tokenizer(tokenizer, n_vocab=size, eos_token=tokenizer.eos_token_id)
        self.size = size
        self.end: int = tokenizer.eos_token_id

    def matcher(self, schema: Mapping[str, Any]) -> Any:
        """The engine's matcher of a JSON text between line breaks; raises `Refused` where it does not support it."""
        from llguidance import LLMatcher

        text = json.dumps({"x-guidance": LLGUIDANCE_OPTIONS, **schema})
        grammar = LLMatcher.grammar_from_lark(f'start: "\\n" call "\\n"\ncall: %json {text}')
        matcher = LLMatcher(self.tokens, grammar, log_level=0)
        if matcher.is_error():
            raise Refused(matcher.get_error())
        return matcher

    def compile(self, name: str, parameters: Mapping[str, Any], opening: Sequence[int]) -> Compiled:
        matcher = self.matcher(call_schema(name, parameters))
        if matcher.try_consume_tokens(list(opening)) < len(opening):
            raise Refused(f"The opening of a call of {name!r} is not accepted.")
        return lambda: LlguidanceCall(self, matcher.deep_copy())


class LlguidanceCall:
    def __init__(self, engine: Llguidance, matcher: Any) -> None:
        self.engine = engine
        self.matcher = matcher

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped() or self.matcher.compute_ff_bytes().decode(errors="ignore") in _CLOSINGS

    def allowed(self) -> Tensor:
        if self.complete:
            return _only(self.engine.end, self.engine.size)
        return _unpacked(np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), self.engine.size)

    def accept(self, tokens: Sequence[int]) -> int:
        return _accepted(tokens, self, lambda token: self.matcher.try_consume_tokens([token]) == 1)

    def take_back(self, count: int) -> None:
        if count:
            self.matcher.rollback(count)

    def forced(self) -> list[int]:
        return [] if self.complete else self.matcher.compute_ff_tokens()


class Xgrammar:
    """xgrammar, which says which text is forced; its tokens are those of the text alone.

    Args:
        tokenizer: the base's tokenizer.
        size: width of the base's logits.
        encode: tokens of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, encode: Encode) -> None:
        from xgrammar import GrammarCompiler, TokenizerInfo

        self.size = size
        self.end: int = tokenizer.eos_token_id
        self.encode = encode
        tokens = TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=[self.end])
        # Without its cache, because compilation is timed.
        self.compiler = GrammarCompiler(tokens, max_threads=1, cache_enabled=False)

    def matcher(self, schema: Mapping[str, Any]) -> Any:
        """The engine's matcher of a JSON text between line breaks; raises `Refused` where it does not support it."""
        from xgrammar import Grammar, GrammarMatcher

        try:
            call = Grammar.from_json_schema(json.dumps(schema), any_whitespace=False, separators=(", ", ": "))
            line_break = Grammar.from_ebnf('root ::= "\\n"')
            compiled = self.compiler.compile_grammar(Grammar.concat(line_break, call, line_break))
        except RuntimeError as error:
            raise Refused(str(error)) from None
        return GrammarMatcher(compiled)

    def compile(self, name: str, parameters: Mapping[str, Any], opening: Sequence[int]) -> Compiled:
        start = self.matcher(call_schema(name, parameters))
        if not all(map(start.accept_token, opening)):
            raise Refused(f"The opening of a call of {name!r} is not accepted.")
        return lambda: XgrammarCall(self, start.fork())


class XgrammarCall:
    def __init__(self, engine: Xgrammar, matcher: Any) -> None:
        self.engine = engine
        self.matcher = matcher

    @cached_property
    def bitmask(self) -> Tensor:
        from xgrammar import allocate_token_bitmask

        return allocate_token_bitmask(1, self.engine.size)

    @property
    def complete(self) -> bool:
        return self.matcher.is_completed() or self.matcher.find_jump_forward_string() in _CLOSINGS

    def allowed(self) -> Tensor:
        if self.complete:
            return _only(self.engine.end, self.engine.size)
        # The mask is left as it was where the engine allows everything.
        if not self.matcher.fill_next_token_bitmask(self.bitmask):
            return torch.ones(self.engine.size, dtype=torch.bool)
        return _unpacked(self.bitmask.numpy().view(np.uint8)[0], self.engine.size)

    def accept(self, tokens: Sequence[int]) -> int:
        return _accepted(tokens, self, self.matcher.accept_token)

    def take_back(self, count: int) -> None:
        if count:
            self.matcher.rollback(count)

    def forced(self) -> list[int]:
        return [] if self.complete else list(self.engine.encode(self.matcher.find_jump_forward_string()))


ENGINES: dict[str, Callable[[PreTrainedTokenizerFast, int, Encode], Engine]] = {
    "llguidance": Llguidance,
    "xgrammar": Xgrammar,
}
"""By the name of the distribution that each needs."""


def _unpacked(words: Any, size: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(words, bitorder="little")[:size].astype(bool))


def _only(token: int, size: int) -> Tensor:
    return torch.arange(size) == token


def _accepted(tokens: Sequence[int], constraint: Constraint, take: Callable[[int], bool]) -> int:
    """How many tokens were taken before one was not, or all was finished."""
    for index, token in enumerate(tokens):
        if constraint.complete or not take(token):
            return index
    return len(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """Arguments that were written.

    Args:
        tokens: their tokens, without an end token.
        cut: whether the limit of length ended them.
        drafted: tokens that a look-up proposed; None where that is not known.
        accepted: those of them that the base chose.
    """

    tokens: list[int]
    cut: bool
    drafted: int | None = None
    accepted: int | None = None


class ConstraintProcessor(LogitsProcessor):
    """Masks for `generate`; its state follows the ids it is shown, which may go back behind rejected candidates.

    Args:
        constraint: the call.
        start: where the arguments begin in the ids.
        end: the end token, of which the constraint is not told.
    """

    def __init__(self, constraint: Constraint, start: int, end: int) -> None:
        self.constraint = constraint
        self.start = start
        self.end = end
        self.taken: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask scores [1, vocab] behind ids [1, length]."""
        self.follow(input_ids)
        return scores.masked_fill(~self.constraint.allowed().to(scores.device), -torch.inf)

    def follow(self, input_ids: Tensor) -> bool:
        """Bring the constraint to where the ids [1, length] are; returns whether the arguments are finished there."""
        tokens = [token for token in input_ids[0, self.start :].tolist() if token != self.end]
        common = next(
            (place for place, pair in enumerate(zip(tokens, self.taken, strict=False)) if pair[0] != pair[1]),
            min(len(tokens), len(self.taken)),
        )
        self.constraint.take_back(len(self.taken) - common)
        if self.constraint.accept(tokens[common:]) < len(tokens) - common:
            raise ValueError("The ids hold a token that the constraint does not allow: mask every choice by it.")
        self.taken = tokens
        return self.constraint.complete


class Complete(StoppingCriteria):
    """Stops as soon as the arguments are finished, so that no forward is spent on the end token."""

    def __init__(self, processor: ConstraintProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """bool [1] for ids [1, length]."""
        return torch.tensor([self.processor.follow(input_ids)], device=input_ids.device)


@torch.no_grad()
def generate(
    base: Any,
    prompt_ids: Sequence[int],
    constraint: Constraint,
    end: int,
    limit: int,
    look_up: int = 0,
    masked: bool = True,
) -> Written:
    """Write arguments with transformers' own `generate`, greedily.

    Args:
        base: the model.
        prompt_ids: tokens up to where the arguments begin.
        constraint: of the call.
        end: the end token.
        limit: most tokens.
        look_up: tokens that each prompt look-up proposes; 0 decodes token by token.
        masked: the constraint masks tokens; else it only says where to stop.

    Returns:
        What was written.
    """
    processor = ConstraintProcessor(constraint, len(prompt_ids), end)
    ids = torch.tensor([list(prompt_ids)], device=base.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=end,
        pad_token_id=end,
        prompt_lookup_num_tokens=look_up or None,
        max_matching_ngram_size=LOOK_UP_GRAM if look_up else None,
    )
    output = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([processor] if masked else []),
        stopping_criteria=StoppingCriteriaList([Complete(processor)]),
    )
    complete = processor.follow(output)
    return Written(processor.taken, not complete, *((None, None) if look_up else (0, 0)))


def greedy(logits: Tensor, allowed: Tensor, written: Sequence[int]) -> int:
    """The likeliest token that is allowed: a `Chooser`."""
    return int(logits.masked_fill(~allowed.to(logits.device), -torch.inf).argmax())


@torch.no_grad()
def decode(
    base: Any,
    prompt_ids: Sequence[int],
    constraint: Constraint,
    limit: int,
    jump: bool = True,
    look_up: int = 0,
    choose: Chooser = greedy,
) -> Written:
    """Write arguments in as few forwards as forced text and prompt look-up allow.

    Every forward runs what is pending (the last choice and the forced text behind it) and what the look-up proposes;
    the first one runs the prompt and the text that is forced at the start. Without both options it is plain
    constrained decoding.

    Args:
        base: the model.
        prompt_ids: tokens up to where the arguments begin.
        constraint: of the call.
        limit: most tokens.
        jump: append forced text without a forward of its own (jump-forward).
        look_up: tokens that each prompt look-up proposes; 0 proposes none.
        choose: makes the choices.

    Returns:
        What was written.
    """
    cache = DynamicCache(config=base.config)
    written = _forced(constraint) if jump else []
    pending = [*prompt_ids, *written]
    drafted = accepted = 0
    while not constraint.complete and len(written) < limit:
        draft = _proposal([*prompt_ids, *written], constraint, look_up) if look_up else []
        ids = torch.tensor([[*pending, *draft]], device=base.device)
        logits = base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=len(draft) + 1).logits[0]
        stands = 0
        while True:
            token = choose(logits[stands], constraint.allowed(), written)
            constraint.accept([token])
            written.append(token)
            if constraint.complete or draft[stands : stands + 1] != [token]:
                break
            stands += 1
        drafted, accepted = drafted + len(draft), accepted + stands
        if stands < len(draft):
            cache.crop(stands - len(draft))
        forced = _forced(constraint) if jump else []
        written += forced
        pending = [token, *forced]
    return Written(written, not constraint.complete, drafted, accepted)


def _forced(constraint: Constraint) -> list[int]:
    """Take the tokens that are forced; an engine that sees further behind them is asked again."""
    tokens: list[int] = []
    while more := constraint.forced():
        fits = constraint.accept(more)
        tokens += more[:fits]
        if fits < len(more):
            break
    return tokens


def _proposal(sequence: Sequence[int], constraint: Constraint, count: int) -> list[int]:
    """The first look-up of which the constraint allows at least one token, cut to what it allows."""
    for candidate in looked_up(sequence, count):
        fits = constraint.accept(candidate)
        constraint.take_back(fits)
        if fits:
            return candidate[:fits]
    return []


def looked_up(sequence: Sequence[int], count: int, gram: int = LOOK_UP_GRAM) -> Iterator[list[int]]:
    """What followed the last tokens of a sequence where they stood before. Source: prompt look-up decoding (Saxena
    2023), in the order of transformers' `PromptLookupCandidateGenerator`.

    Args:
        sequence: all tokens so far.
        count: most tokens of a continuation.
        gram: longest stretch that is looked for.

    Yields:
        Continuations, those behind longer matches first, then from the left.
    """
    sequence = list(sequence)
    for size in range(min(gram, len(sequence) - 1), 0, -1):
        tail = sequence[-size:]
        for place in range(len(sequence) - size):
            if sequence[place] == tail[0] and sequence[place : place + size] == tail:
                yield sequence[place + size : place + size + count]
