"""The loop that writes calls, driven by hand: drafts change what a reply costs and never what it says."""

import json
import logging
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import schemas
from repo_package import load_repo_module
from tiny_tokenizer import tiny_vocabulary

decoding = load_repo_module("call_decoding")
drafting = load_repo_module("drafting")
grammar_module = load_repo_module("reply_grammar")
layout_module = load_repo_module("scaffold_layout")
scaffold_module = load_repo_module("schema_scaffold")
CallWriter, GenerationStats, Sampler = decoding.CallWriter, decoding.GenerationStats, decoding.Sampler
choose_best, parse_calls = decoding.choose_best, decoding.parse_calls

VOCABULARY = tiny_vocabulary()
CONTEXT = [5, 6, 7]
CONFIG = SimpleNamespace(
    string_budget=5,
    number_budget=5,
    array_budget=2,
    max_value_tokens=6,
    mask_token_id=VOCABULARY.size,
    null_token_id=VOCABULARY.size + 1,
)
STRING = {"type": "string"}
CLOSED = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "unit": {"enum": ["celsius", "fahrenheit", "kelvin"]}},
    "required": ["ok", "unit"],
}
OPEN = {
    "type": "object",
    "properties": {
        "city": STRING,
        "days": {"type": "integer"},
        "list": {"type": "array", "items": {"type": "number"}},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
}
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
Base = Callable[[Sequence[int]], Tensor]


def grammar_of(*parameters: Any, names: Sequence[str] = ("act", "check", "get_time"), **limits: int) -> Any:
    """The calls of tools with these parameters; values and calls are short unless the limits say otherwise."""
    tools = [schemas.tool(each, name) for each, name in zip(parameters, names, strict=False)]
    bounds = {"max_tool_calls": 1, "max_value_tokens": 6, "max_call_tokens": 40, **limits}
    return grammar_module.ReplyGrammar(VOCABULARY, [scaffold_module.compile_scaffold(tool) for tool in tools], **bounds)


def base_of(seed: int, scale: float = 4.0, **bias: float) -> Base:
    """A base: logits that depend on all tokens so far, and on nothing else; `end` and `quote` can be biased."""
    tokens = {"end": VOCABULARY.im_end, "quote": VOCABULARY.encode('"')[0]}
    known: dict[tuple[int, ...], Tensor] = {}

    def logits(prefix: Sequence[int]) -> Tensor:
        key = tuple(prefix)
        if key not in known:
            chance = torch.Generator().manual_seed(zlib.crc32(repr((seed, key)).encode()))
            known[key] = torch.randn(VOCABULARY.size, generator=chance) * scale
            for name, value in bias.items():
                known[key][tokens[name]] += value
        return known[key]

    return logits


def writer_of(grammar: Any, drafter: Any = None, **options: Any) -> Any:
    """A writer; without a drafter the reference."""
    defaults = {"unchecked": False, "steps": 3, "choose": choose_best, "room": None, "stats": GenerationStats()}
    return CallWriter(grammar, CONTEXT, drafter=drafter, **{**defaults, "array_budget": 2, **options})


def random_head(seed: int) -> Callable[[Any], Tensor]:
    """A head that says anything."""
    chance = torch.Generator().manual_seed(seed)

    def predict(request: Any) -> Tensor:
        scores = torch.randn(len(request.positions), VOCABULARY.size + 2, generator=chance) * 4
        return scores.log_softmax(-1)

    return predict


def no_head(_request: Any) -> Tensor:
    raise AssertionError("nobody asks the head here")


def run(writer: Any, base: Base, head: Callable[[Any], Tensor] = no_head) -> list[Any]:
    """Run a writer to its end with a cache of plain tokens; returns the base's requests, checked one by one."""
    cached = list(writer.reply)
    writing = writer.write(base([*CONTEXT, *cached]))
    requests: list[Any] = []
    request = next(writing, None)
    while request is not None:
        if isinstance(request, drafting.HeadRequest):
            answer = head(request)
        else:
            assert_asks_only_for_choices(writer, cached, request)
            requests.append(request)
            cached += request.tokens
            end = len(cached) - len(request.tokens)
            answer = torch.stack([base([*CONTEXT, *cached[: end + place + 1]]) for place in request.keep])
        before = request
        try:
            request = writing.send(answer)
        except StopIteration:
            request = None
        if isinstance(before, decoding.BaseRequest) and before.rejected:
            del cached[-before.rejected :]
        assert writer.reply[: len(cached)] == cached
    return requests


def assert_asks_only_for_choices(writer: Any, cached: list[int], request: Any) -> None:
    """A request holds the tokens that are not cached yet and a draft that the grammar allows, and asks for the logits
    of every place in it where there is a choice, and of the last."""
    pending = writer.reply[len(cached) :]
    assert pending
    assert request.tokens[: len(pending)] == pending
    tokens = [*cached, *request.tokens]
    cursors = writer.grammar.start().walk(tokens[len(writer.grammar.opening()) :])
    assert len(cursors) == len(tokens) - len(writer.grammar.opening())
    drafted = cursors[len(cursors) - len(request.tokens) + len(pending) - 1 :]
    choices = [len(pending) - 1 + place for place, cursor in enumerate(drafted[:-1]) if cursor.forced() is None]
    assert request.keep == [*choices, len(request.tokens) - 1]
    if writer.limit is not None:
        assert len(tokens) <= writer.limit


def reference(grammar: Any, base: Base, **options: Any) -> tuple[Any, int]:
    """The reference's writer at its end, and how many forwards it took."""
    writer = writer_of(grammar, **options)
    return writer, len(run(writer, base))


class Fixed:
    """Drafts given arguments, the same every time, and keeps the tasks.

    Args:
        calls: name and arguments of each call.
        ahead: expect all further calls too.
    """

    def __init__(self, calls: Sequence[dict[str, Any]], ahead: bool = False) -> None:
        self.calls, self.ahead = calls, ahead
        self.tasks: list[Any] = []

    def draft(self, task: Any) -> Iterator[Any]:
        self.tasks.append(task)
        if task.call >= len(self.calls):
            return None
        following = self.calls[task.call + 1 :] if self.ahead else []
        pairs = [(call["name"], call["arguments"]) for call in following]
        return drafting.Draft(self.calls[task.call]["arguments"], [], [], pairs)
        yield  # a drafter is a generator, also one that asks for nothing


class Wandering:
    """Drafts any arguments that fit, others each time; sometimes none, sometimes with further calls behind them."""

    def __init__(self, grammar: Any, seed: int) -> None:
        self.grammar, self.chance = grammar, random.Random(seed)

    def arguments(self, scaffold: Any) -> dict[str, Any]:
        return json.loads(schemas.walk(scaffold, self.chance, self.chance.random(), 8))

    def draft(self, task: Any) -> Iterator[Any]:
        if self.chance.random() < 0.2:
            return None
        chosen = self.chance.choices(self.grammar.scaffolds, k=self.chance.randint(0, 3))
        following = [(scaffold.tool, self.arguments(scaffold)) for scaffold in chosen]
        return drafting.Draft(self.arguments(task.scaffold), [], [], following)
        yield


@pytest.fixture(scope="module")
def made_up() -> list[dict[str, Any]]:
    """Parameters of tools."""
    return [*schemas.examples(schemas.rich_parameter_schemas, 16), *schemas.examples(schemas.parameter_schemas, 16)]


def assert_valid(grammar: Any, parameters: Sequence[dict[str, Any]], writer: Any) -> None:
    """A reply is complete and each of its calls validates."""
    assert writer.reply[: len(grammar.opening())] == grammar.opening()
    assert writer.reply[-1] == VOCABULARY.im_end
    schema_of = {scaffold.tool: each for scaffold, each in zip(grammar.scaffolds, parameters, strict=True)}
    calls = parse_calls(VOCABULARY, writer.reply)
    assert len(calls) == writer.stats.calls > 0
    for call in calls:
        assert list(Draft202012Validator(schema_of[call["name"]]).iter_errors(call["arguments"])) == []


# ------------------------------------------------------------------------------------------------- verified = ar


def _right(right: list[int], chance: random.Random) -> list[int]:
    return right


def _random_tokens(right: list[int], chance: random.Random) -> list[int]:
    return [chance.randrange(VOCABULARY.size) for _ in range(chance.randint(0, 30))]


def _truncated(right: list[int], chance: random.Random) -> list[int]:
    return right[: chance.randint(0, len(right))]


def _one_changed(right: list[int], chance: random.Random) -> list[int]:
    place = chance.randrange(len(right) or 1)
    return [*right[:place], chance.randrange(VOCABULARY.size), *right[place + 1 :]]


def _one_left_out(right: list[int], chance: random.Random) -> list[int]:
    place = chance.randrange(len(right) or 1)
    return [*right[:place], *right[place + 1 :]]


def _with_rubbish(right: list[int], chance: random.Random) -> list[int]:
    return [*right, *(chance.randrange(VOCABULARY.size) for _ in range(5))]


@pytest.mark.parametrize("kind", [_right, _random_tokens, _truncated, _one_changed, _one_left_out, _with_rubbish])
@settings(quick, max_examples=12)
@given(index=st.integers(0, 31), seed=st.integers(0, 10**6), calls=st.integers(1, 3))
def test_any_tokens_of_a_draft_leave_the_reply_as_it_is(
    made_up: list[Any], kind: Callable[[list[int], random.Random], list[int]], index: int, seed: int, calls: int
) -> None:
    """And they never cost a forward more than none."""
    parameters = [made_up[index], made_up[seed % 32]][: 1 + seed % 2]
    grammar, chance = grammar_of(*parameters, max_tool_calls=calls), random.Random(seed)
    base = base_of(seed, end=(-100.0, 0.0)[seed % 2])
    ar, forwards = reference(grammar, base)
    assert_valid(grammar, parameters, ar)

    class Adversarial(CallWriter):  # type: ignore[misc, valid-type]
        def drafted_tokens(self, *_: Any, **__: Any) -> Generator[Any, Any, list[int]]:
            return kind(ar.reply[len(self.reply) :], chance)
            yield

    writer = Adversarial(
        grammar, CONTEXT, drafter=Fixed([]), unchecked=False, steps=1, choose=choose_best, room=None,
        stats=GenerationStats(),
    )  # fmt: skip
    requests = run(writer, base)
    assert writer.reply == ar.reply
    assert writer.stats.cut == ar.stats.cut
    assert len(requests) <= forwards
    if kind is _right:
        # A name that several tools share a beginning with is read off first; then everything stands at once.
        assert len(requests) <= max(1, 3 * ar.stats.calls)


@settings(quick, max_examples=40)
@given(index=st.integers(0, 31), seed=st.integers(0, 10**6), calls=st.integers(1, 4))
def test_any_arguments_of_a_draft_leave_the_reply_as_it_is(
    made_up: list[Any], index: int, seed: int, calls: int
) -> None:
    parameters = [made_up[index], made_up[seed % 32]]
    grammar = grammar_of(*parameters, max_tool_calls=calls)
    base = base_of(seed, end=(-100.0, 0.0)[seed % 2])
    ar, forwards = reference(grammar, base)
    writer = writer_of(grammar, Wandering(grammar, seed))
    requests = run(writer, base)
    assert writer.reply == ar.reply
    assert writer.stats.cut == ar.stats.cut
    assert len(requests) <= forwards
    assert 0 <= writer.stats.accepted_slots <= writer.stats.drafted_slots
    assert_valid(grammar, parameters, writer)


@settings(quick, max_examples=25)
@given(index=st.integers(0, 31), seed=st.integers(0, 10**6))
def test_a_random_head_leaves_the_reply_as_it_is(made_up: list[Any], index: int, seed: int) -> None:
    grammar, base = grammar_of(made_up[index], max_tool_calls=1 + seed % 3), base_of(seed)
    ar, forwards = reference(grammar, base)
    writer = writer_of(grammar, drafting.HeadDrafter(VOCABULARY, CONFIG))
    requests = run(writer, base, random_head(seed))
    assert writer.reply == ar.reply
    assert len(requests) <= forwards


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_base_still_writes_valid_calls_and_the_same_ones(value: float) -> None:
    for seed in range(3):
        sound = base_of(seed)

        def base(prefix: Sequence[int], sound: Base = sound) -> Tensor:
            logits = sound(prefix)
            return torch.where(logits > 0, value, logits) if len(prefix) % 5 else torch.full_like(logits, value)

        grammar = grammar_of(OPEN, CLOSED, max_tool_calls=2)
        for options in ({}, {"choose": Sampler([TemperatureLogitsWarper(0.5)], 3)}):
            ar, forwards = reference(grammar, base, **options)
            assert_valid(grammar, [OPEN, CLOSED], ar)
            again = {} if not options else {"choose": Sampler([TemperatureLogitsWarper(0.5)], 3)}
            writer = writer_of(grammar, Wandering(grammar, seed), **again)
            assert len(run(writer, base)) <= forwards
            assert writer.reply == ar.reply


# ------------------------------------------------------------------------------------------------- what a call costs


def test_a_right_draft_is_verified_in_one_forward() -> None:
    for seed in range(5):
        grammar, base = grammar_of(OPEN, max_value_tokens=40, max_call_tokens=200), base_of(seed, quote=12.0)
        ar, forwards = reference(grammar, base)
        # Values are spelled by the base; a draft spells them as the tokenizer does.
        drafter = Fixed(parse_calls(VOCABULARY, ar.reply))
        writer = writer_of(grammar, drafter)
        requests = run(writer, base)
        tokens = grammar_module.call_continuation(VOCABULARY, grammar.scaffolds[0], drafter.calls[0]["arguments"], b"")
        if tokens == ar.reply[1:-1]:
            assert len(requests) == 1
            assert len(drafter.tasks) == 1
            assert writer.stats.accepted_slots == writer.stats.drafted_slots
    grammar, base = grammar_of(CLOSED), base_of(0)
    ar, forwards = reference(grammar, base)
    writer = writer_of(grammar, Fixed(parse_calls(VOCABULARY, ar.reply)))
    assert len(run(writer, base)) == 1 < forwards


def test_calls_that_are_drafted_together_are_verified_together() -> None:
    for seed in range(6):
        grammar, base = grammar_of(CLOSED, CLOSED, max_tool_calls=4), base_of(seed, end=-100.0)
        ar, _ = reference(grammar, base)
        drafter = Fixed(parse_calls(VOCABULARY, ar.reply), ahead=True)
        writer = writer_of(grammar, drafter)
        assert len(run(writer, base)) == 1
        assert writer.reply == ar.reply
        assert [task.call for task in drafter.tasks] == [0]
        assert writer.stats.calls == 4
        assert writer.stats.accepted_slots == writer.stats.drafted_slots == 8


def test_a_wrong_call_in_the_middle_keeps_those_in_front_of_it() -> None:
    grammar, base = grammar_of(CLOSED, max_tool_calls=4), base_of(1, end=-100.0)
    ar, _ = reference(grammar, base)
    right = parse_calls(VOCABULARY, ar.reply)
    wrong = [dict(call) for call in right]
    wrong[2] = {"name": "act", "arguments": {**right[2]["arguments"], "ok": not right[2]["arguments"]["ok"]}}
    drafter = Fixed(wrong, ahead=True)
    requests = run(writer := writer_of(grammar, drafter), base)
    assert writer.reply == ar.reply
    # The first forward accepts two calls; the third, corrected at once, is not drafted right any more.
    assert requests[0].rejected > 0
    assert len(requests) <= 4
    assert writer.stats.drafted_slots == 8
    assert writer.stats.accepted_slots == 7


def test_more_calls_than_are_allowed_are_cut_off() -> None:
    grammar, base = grammar_of(CLOSED, max_tool_calls=2), base_of(1, end=-100.0)
    ar, _ = reference(grammar, base)
    calls = parse_calls(VOCABULARY, ar.reply)
    writer = writer_of(grammar, Fixed(calls * 3, ahead=True))
    assert len(run(writer, base)) == 1
    assert writer.reply == ar.reply


def test_the_name_of_a_next_call_is_read_off_behind_the_one_before() -> None:
    """From the third call on: two calls suggest another, and its opening is run with the draft."""
    grammar, base = grammar_of(CLOSED, OPEN, max_tool_calls=4, max_value_tokens=40), base_of(3, end=-100.0)
    ar, _ = reference(grammar, base)
    drafter = Fixed(parse_calls(VOCABULARY, ar.reply))
    requests = run(writer_of(grammar, drafter), base)
    opening = [*VOCABULARY.encode("\n"), *grammar.opening()]
    assert [request.tokens[-len(opening) :] == opening for request in requests].count(True) >= 2
    assert requests[0].tokens[-1] == VOCABULARY.call_end


@pytest.mark.parametrize("asks", [True, False])
def test_drafts_of_the_head_that_save_nothing_are_given_up(asks: bool) -> None:
    """Those that cost no forward of the head are made again behind each correction."""
    long = schemas.one({"type": "array", "items": {"type": "boolean"}, "minItems": 12, "maxItems": 12})
    grammar, base = grammar_of(long, max_call_tokens=200), base_of(2)
    ar, forwards = reference(grammar, base)

    class Contrary:
        """Drafts the opposite of what the base writes next."""

        def __init__(self) -> None:
            self.tasks: list[Any] = []

        def draft(self, task: Any) -> Iterator[Any]:
            self.tasks.append(task)
            if asks:
                yield drafting.HeadRequest(*[torch.zeros(1, dtype=torch.long)] * 3, 1.0)
            right = parse_calls(VOCABULARY, ar.reply)[0]["arguments"]["a"]
            done = task.written.count("e,")
            items = [item if place < done else not item for place, item in enumerate(right)]
            return drafting.Draft({"a": items}, [], [])

    drafter = Contrary()
    requests = run(writer := writer_of(grammar, drafter), base, random_head(0))
    assert writer.reply == ar.reply
    assert len(requests) == forwards >= 12
    assert len(drafter.tasks) == (decoding.MAX_VAIN_DRAFTS if asks else forwards)


@pytest.mark.parametrize("unchecked", [False, True])
@pytest.mark.parametrize(
    "calls",
    [
        [("act", {"city": 3, "unit": "celsius"})],
        [("act", {"unit": "celsius", "more": 1})],
        [("act", {})],
        [("act", {"city": "x", "unit": "celsius"}), ("nobody", {})],
        [("act", {"city": "x", "unit": "celsius"}), ("act", {"city": []})],
    ],
)
def test_a_drafter_that_errs_costs_forwards_and_nothing_else(calls: list[Any], unchecked: bool) -> None:
    grammar, base = grammar_of(OPEN, max_tool_calls=2), base_of(4, end=-100.0)
    drafter = Fixed([{"name": name, "arguments": arguments} for name, arguments in calls], ahead=True)
    run(writer := writer_of(grammar, drafter, unchecked=unchecked), base)
    assert_valid(grammar, [OPEN], writer)
    if not unchecked:
        assert writer.reply == reference(grammar, base)[0].reply


def test_a_redraft_takes_one_step_and_knows_what_is_written() -> None:
    grammar, base = grammar_of(OPEN, max_tool_calls=3), base_of(4, end=-100.0)
    ar, _ = reference(grammar, base)
    drafter = Fixed([{"name": "act", "arguments": {"city": "x", "unit": "celsius"}}] * 3)
    run(writer := writer_of(grammar, drafter, steps=5), base)
    assert writer.reply == ar.reply
    calls = [json.dumps(call["arguments"], ensure_ascii=False) for call in parse_calls(VOCABULARY, ar.reply)]
    seen = set()
    for task in drafter.tasks:
        assert task.steps == (1 if task.call in seen else 5)
        assert task.before == (drafter.calls[task.call]["arguments"] if task.call in seen else None)
        seen.add(task.call)
        assert task.prompt_ids == CONTEXT
        assert task.scaffold is grammar.scaffolds[0]
        assert not task.widen
        assert task.on_step is None
        head = task.written.rpartition(", ")[0]
        assert calls[task.call].startswith(head)
    assert seen == {0, 1, 2}


def test_a_call_of_fixed_text_needs_no_forward() -> None:
    grammar = grammar_of({"type": "object", "properties": {}, "additionalProperties": False})
    writer = writer_of(grammar, Fixed([]))
    assert run(writer, base_of(0)) == []
    assert parse_calls(VOCABULARY, writer.reply) == [{"name": "act", "arguments": {}}]


def test_nothing_is_drafted_before_the_tool_is_known() -> None:
    """Names with a common beginning cost a forward of their own."""
    for seed in range(4):
        grammar, base = grammar_of(CLOSED, OPEN, names=("check", "cherish")), base_of(seed)
        ar, _ = reference(grammar, base)
        drafter = Fixed(parse_calls(VOCABULARY, ar.reply))
        requests = run(writer := writer_of(grammar, drafter), base)
        assert writer.reply == ar.reply
        assert drafter.tasks[0].scaffold.tool == drafter.calls[0]["name"]
        assert len(requests[0].keep) == 1  # no draft


# ------------------------------------------------------------------------------------------------- room


def outcome(grammar: Any, base: Base, drafter: Any, room: int) -> list[int] | None:
    """The reply, or None where the room does not suffice."""
    writer = writer_of(grammar, drafter, room=room)
    try:
        run(writer, base)
    except ValueError as error:
        said = str(error)
    else:
        return writer.reply
    assert f"{len(CONTEXT)} tokens" in said
    assert f"{len(CONTEXT) + room} tokens" in said
    return None


@pytest.mark.parametrize("seed", range(4))
def test_the_same_replies_fit_into_a_context_with_drafts_and_without(seed: int) -> None:
    """The base is never run past its context, and no room in it is left unused."""
    grammar, base = grammar_of(CLOSED, OPEN, max_tool_calls=2), base_of(seed)
    whole, _ = reference(grammar, base)
    calls = parse_calls(VOCABULARY, whole.reply)
    # Behind the last choice nothing is run, so the reply may end just outside.
    least = 1 + max(
        place
        for place, cursor in enumerate(grammar.start().walk(whole.reply[len(grammar.opening()) :]))
        if not cursor.finished and cursor.forced() is None
    ) + len(grammar.opening())  # fmt: skip
    rooms = {*range(len(grammar.opening()), len(whole.reply), 7), *range(least - 3, least + 3), len(whole.reply) + 1}
    for room in sorted(rooms):
        for drafter in (None, Fixed(calls), Fixed(calls, ahead=True), Wandering(grammar, room)):
            assert outcome(grammar, base, drafter, room) == (None if room < least else whole.reply), (room, least)


# ------------------------------------------------------------------------------------------------- what is told


def inside(text: str, place: int) -> bool:
    """Whether a place in the text of calls is inside a name, a string, a number or a word.

    Between a quote and the first character behind it nothing is half written yet.
    """
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[-+.\w]+', text, re.DOTALL):
        start, end = found.span()
        if start + (text[start] == '"') < place < end:
            return True
    return False


@pytest.mark.parametrize(
    ("text", "breaks_off"),
    [
        ('', False),
        ('\n', False),
        ('\n{"name": "', False),
        ('\n{"name": "a', True),
        ('\n{"name": "act", "arguments": {"a": "', False),
        ('{"a": "x', True),
        ('{"a": "{"', False),
        ('{"a": "x {', True),
        ('{"a": "x\\', True),
        ('{"a": "\\', True),
        ('{"a": "x\\"', True),
        ('{"a": "x\\\\"', False),
        ('{"a": "é', True),
        ('{"a": tru', True),
        ('{"a": -', True),
        ('{"a": [1.5e+', True),
        ('{"a": [12, ', False),
        ('{"a": [12]}}\n', False),
    ],
)  # fmt: skip
def test_what_breaks_off_inside_a_word_is_seen(text: str, breaks_off: bool) -> None:
    assert decoding.breaks_off(text.encode()) == breaks_off


def test_long_calls_are_read_in_time_that_grows_with_their_length() -> None:
    """No text makes the reading go back and forth."""
    start = time.perf_counter()
    for text in (b'"x", ' * 20_000, b'"' + b'\\"' * 50_000, b'"' + b"{[:,x" * 20_000, b'"" "' * 33_333):
        decoding.breaks_off(text)
    assert time.perf_counter() - start < 2


CHOICES = {
    "type": "object",
    "properties": {
        "a": STRING,
        "b": {"type": "integer"},
        "unit": {"enum": ["celsius", "celsium", 100, 1000, False, {"city": ["x", 10]}]},
        "ok": {"type": "boolean"},
    },
    "required": ["a", "b", "unit"],
    "additionalProperties": {"type": "number"},
}


@pytest.mark.parametrize("drafts", ["none", "right", "wandering", "head", "unchecked"])
def test_every_token_is_told_once_in_order_and_never_half_a_name_or_value(drafts: str) -> None:
    """Names that begin alike, in the first call and behind others; choices that begin alike, and freely named keys."""
    for seed in range(4):
        grammar = grammar_of(CHOICES, CHOICES, CLOSED, names=("act", "action", "get_time"), max_tool_calls=3)
        base = base_of(seed, end=(-100.0, 0.0)[seed % 2])
        ar, _ = reference(grammar, base)
        drafters = {
            "none": None,
            "right": Fixed(parse_calls(VOCABULARY, ar.reply), ahead=True),
            "wandering": Wandering(grammar, seed),
        }
        told: list[list[int]] = []
        drafter = drafters.get(drafts, drafting.HeadDrafter(VOCABULARY, CONFIG))
        writer = writer_of(grammar, drafter, on_tokens=told.append, unchecked=drafts == "unchecked")
        run(writer, base, random_head(seed))
        assert all(told)
        assert [token for tokens in told for token in tokens] == writer.reply
        assert len(told) > 5
        whole, sent = VOCABULARY.spell(writer.reply), list[int]()
        for tokens in told:
            sent += tokens
            written = VOCABULARY.spell(sent)
            assert whole.startswith(written)
            assert not inside(whole.decode(), len(written.decode())), written[-40:]


def test_a_guided_value_is_told_whole() -> None:
    """Also where it is an object, inside which words end."""
    pytest.importorskip("llguidance")
    names = [f"k{number}" for number in range(70)]
    objects = [{"type": "object", "properties": {name: STRING}, "required": [name]} for name in names]
    parameters = schemas.one({"anyOf": [{**each, "additionalProperties": False} for each in objects]})
    scaffold = scaffold_module.compile_scaffold(schemas.tool(parameters), "ar")
    grammar = grammar_module.ReplyGrammar(VOCABULARY, [scaffold], 1, 100, 200)
    value = b'{"k69": "the city, {}"}'
    whole = b'\n{"name": "act", "arguments": {"a": ' + value + b"}}\n"

    def base(prefix: Sequence[int]) -> Tensor:
        logits = torch.zeros(VOCABULARY.size)
        written = VOCABULARY.spell(prefix[len(CONTEXT) :])
        for token, size in VOCABULARY.prefix_tokens(whole[len(written) :]):
            logits[token] = size
        return logits

    told: list[list[int]] = []
    run(writer := writer_of(grammar, on_tokens=told.append), base)
    assert VOCABULARY.spell(writer.reply) == whole
    start, sent = whole.index(value), list[int]()
    for tokens in told:
        sent += tokens
        assert not start < len(VOCABULARY.spell(sent)) < start + len(value)


def test_tokens_are_told_as_soon_as_they_are_final() -> None:
    """Not only at the end: behind each forward everything that no value keeps back is told."""
    grammar, base = grammar_of(CLOSED, max_tool_calls=2), base_of(0, end=-100.0)
    told: list[int] = []
    writer = writer_of(grammar, on_tokens=told.extend)
    writing = writer.write(base([*CONTEXT, *writer.reply]))
    next(writing)
    assert told == writer.reply


# ------------------------------------------------------------------------------------------------- stats and trace


def test_stats_say_what_became_of_the_first_draft() -> None:
    grammar, base = grammar_of(CLOSED), base_of(5)
    ar, _ = reference(grammar, base)
    right = parse_calls(VOCABULARY, ar.reply)[0]["arguments"]
    for ok, unit, accepted in ((True, True, 2), (True, False, 1), (False, True, 1), (False, False, 0)):
        draft = {
            "ok": right["ok"] if ok else not right["ok"],
            "unit": right["unit"] if unit else {"celsius": "kelvin"}.get(right["unit"], "celsius"),
        }
        writer = writer_of(grammar, Fixed([{"name": "act", "arguments": draft}]))
        run(writer, base)
        assert (writer.stats.calls, writer.stats.drafted_slots, writer.stats.accepted_slots) == (1, 2, accepted)
        assert {"draft", "verify"} <= set(writer.stats.seconds)
    assert ar.stats.drafted_slots == ar.stats.accepted_slots == 0


def test_stats_say_of_each_slot_what_it_was_drafted_as_and_what_it_became() -> None:
    pair = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}
    properties = {
        "sure": {"type": "boolean"},
        "either": {"anyOf": [{"type": "boolean"}, {**pair, "minItems": 2}]},
        "list": pair,
        "free": {"enum": [3, 4]},
    }
    grammar = grammar_of(
        {"type": "object", "properties": properties, "required": ["sure", "either", "list"]}, max_call_tokens=200
    )
    writer, _ = reference(grammar, base_of(3))
    final = parse_calls(VOCABULARY, writer.reply)[0]["arguments"]
    either = [1, 1] if isinstance(final["either"], bool) else True
    writer.drafted = {0: {"sure": not final["sure"], "either": either, "list": [1, 2]}}
    writer.stats = GenerationStats()
    writer.count_slots()
    found = {(slot.path, slot.kind): slot for slot in writer.stats.slots}
    sure = found["/sure", "boolean"]
    assert (sure.drafted, sure.final) == (json.dumps(not final["sure"]), json.dumps(final["sure"]))
    branch = found["/either", "branch"]
    assert branch.drafted != branch.final is not None
    others = [slot for (path, kind), slot in found.items() if path.startswith("/either") and kind != "branch"]
    assert others, "the slots of the branch that was drafted"
    assert all(slot.final is None for slot in others), "the call went another way"
    assert found["/list", "length"].drafted == "2"
    assert found["/list", "length"].accepted == (len(final["list"]) == 2)
    assert found["/list/0", "enum"].accepted == (final["list"][0] == 1)
    assert found["/free", "presence"].accepted == ("free" not in final)
    assert ("/free", "enum") not in found, "what the draft leaves out is no slot of it"
    values = [slot for slot in writer.stats.slots if slot.kind in ("boolean", "enum")]
    assert writer.stats.drafted_slots == len(values) == 3 + len(others)
    assert writer.stats.accepted_slots == sum(slot.accepted for slot in values) < len(values)
    assert branch.kind in decoding.STRUCTURE_KINDS


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, "string"),
        ({"type": "string", "format": "date"}, "string"),
        ({"type": "integer"}, "integer"),
        ({"type": "number"}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"const": True}, "boolean"),
        ({"enum": ["true", "false"]}, "enum"),
        ({"enum": [1, True, None]}, "enum"),
    ],
)
def test_the_kind_of_a_slot_is_what_it_holds(schema: dict[str, Any], kind: str) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    layout = layout_module.draft_layout(scaffold_module.compile_scaffold(schemas.tool(parameters, "act")), 1)
    assert [decoding.slot_kind(slot) for slot in layout.slots] == [kind]


def test_values_that_are_cut_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    grammar = grammar_of(schemas.one(STRING), max_value_tokens=4)
    writer = writer_of(grammar)
    logger = logging.getLogger(decoding.logger.name)
    logger.addHandler(caplog.handler)
    try:
        run(writer, base_of(0, quote=-100.0))
    finally:
        logger.removeHandler(caplog.handler)
    assert writer.stats.cut == ("/properties/a",)
    assert "'/properties/a'" in caplog.text
    assert len(VOCABULARY.encode(parse_calls(VOCABULARY, writer.reply)[0]["arguments"]["a"])) <= 4


def test_time_is_added_up_per_stage_also_when_something_fails() -> None:
    stats = GenerationStats()
    with stats.timed("draft"):
        pass
    first = stats.seconds["draft"]
    with pytest.raises(KeyError), stats.timed("draft"):
        raise KeyError
    assert stats.seconds["draft"] > first > 0
    assert set(stats.seconds) == {"draft"}


def test_the_trace_tells_what_was_accepted_and_what_was_chosen_instead() -> None:
    grammar, base = grammar_of(CLOSED), base_of(5)
    ar, _ = reference(grammar, base)
    right = parse_calls(VOCABULARY, ar.reply)[0]["arguments"]
    wrong = {**right, "ok": not right["ok"]}
    traces = []
    for arguments in (right, wrong):
        trace: list[Any] = []
        requests = run(writer_of(grammar, Fixed([{"name": "act", "arguments": arguments}]), trace=trace), base)
        assert [event.kind for event in trace] == ["verify"] * len(requests)
        traces.append(trace)
    (only,), (first, *_) = traces
    assert json.dumps(right)[1:-1].endswith(only.data["accepted"].partition("}")[0])
    assert only.data["drafted"] == only.data["chosen"] == ""
    assert (first.data["drafted"], first.data["chosen"]) == tuple(map(json.dumps, (wrong["ok"], right["ok"])))
    assert first.data["accepted"] == ""


def test_the_trace_and_whoever_watches_see_every_denoising_step() -> None:
    grammar, base, trace, asked, seen = grammar_of(OPEN), base_of(1), list[Any](), list[Any](), list[Any]()
    head = random_head(0)

    def predict(request: Any) -> Tensor:
        asked.append(request)
        return head(request)

    def watch(canvas: Any, ids: Tensor, written: str) -> None:
        seen.append((canvas.view(ids), written))

    writer = writer_of(grammar, drafting.HeadDrafter(VOCABULARY, CONFIG), trace=trace, on_draft=watch)
    requests = run(writer, base, predict)
    drafts = [event.data for event in trace if event.kind == "draft"]
    assert len(drafts) == len(asked) == len(seen) > 1
    assert [event.kind for event in trace].count("verify") == len(requests)
    assert {data["call"] for data in drafts} == {0}
    assert [data["canvas"] for data in drafts] == [view for view, _ in seen]
    whole = VOCABULARY.spell(writer.reply).decode().partition('"arguments": ')[2]
    assert all(whole.startswith(written) for _, written in seen)


# ------------------------------------------------------------------------------------------------- unchecked drafts


@settings(quick, max_examples=20)
@given(index=st.integers(0, 31), seed=st.integers(0, 10**6))
def test_unchecked_drafts_of_a_random_head_are_valid_calls(made_up: list[Any], index: int, seed: int) -> None:
    parameters = [made_up[index], made_up[seed % 32]][: 1 + seed % 2]
    grammar = grammar_of(*parameters, max_tool_calls=1 + seed % 3)
    writer = writer_of(grammar, drafting.HeadDrafter(VOCABULARY, CONFIG), unchecked=True)
    run(writer, base_of(seed), random_head(seed))
    assert_valid(grammar, parameters, writer)


def test_an_unchecked_draft_is_the_call() -> None:
    drafter = Fixed([{"name": "act", "arguments": {"ok": True, "unit": "kelvin"}}])
    writer = writer_of(grammar_of(CLOSED), drafter, unchecked=True, steps=4)
    assert run(writer, base_of(0)) == []
    assert [call["arguments"] for call in parse_calls(VOCABULARY, writer.reply)] == [drafter.calls[0]["arguments"]]
    assert (writer.stats.drafted_slots, writer.stats.accepted_slots) == (2, 2)
    assert [(task.steps, task.widen) for task in drafter.tasks] == [(4, True)]


def test_only_the_base_decides_on_further_calls_behind_an_unchecked_draft() -> None:
    calls = [{"name": "act", "arguments": {"ok": True, "unit": "kelvin"}}] * 3
    for end, count in ((100.0, 1), (-100.0, 3)):
        grammar = grammar_of(CLOSED, max_tool_calls=3)
        writer = writer_of(grammar, Fixed(calls, ahead=True), unchecked=True)
        requests = run(writer, base_of(0, end=end))
        assert parse_calls(VOCABULARY, writer.reply) == calls[:count]
        assert len(requests) == min(count, 2)


def test_what_an_unchecked_draft_repeats_is_left_to_the_base() -> None:
    """A draft's slots know nothing of each other, so distinct items are the grammar's business."""
    parameters = schemas.one({"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 3})
    grammar = grammar_of(parameters)
    for seed in range(10):
        writer = writer_of(grammar, drafting.HeadDrafter(VOCABULARY, CONFIG), unchecked=True)
        run(writer, base_of(seed), random_head(seed))
        assert_valid(grammar, [parameters], writer)


def test_a_call_that_cannot_be_drafted_is_written_by_the_base(caplog: pytest.LogCaptureFixture) -> None:
    grammar, base = grammar_of(CLOSED), base_of(3)
    ar, forwards = reference(grammar, base)
    logger = logging.getLogger(decoding.logger.name)
    logger.addHandler(caplog.handler)
    try:
        writer = writer_of(grammar, Fixed([]), unchecked=True)
        assert len(run(writer, base)) == forwards
    finally:
        logger.removeHandler(caplog.handler)
    assert writer.reply == ar.reply
    assert "'act' is too large" in caplog.text


# ------------------------------------------------------------------------------------------------- sampling


def exact(grammar: Any, base: Base) -> dict[tuple[int, ...], float]:
    """The probability of each reply when every choice is drawn from the base over what the grammar allows."""
    found: dict[tuple[int, ...], float] = {}
    pending = [(grammar.start(), tuple(grammar.opening()), 1.0)]
    while pending:
        cursor, reply, probability = pending.pop()
        if cursor.finished:
            found[reply] = probability
            continue
        allowed = cursor.mask().nonzero()[:, 0]
        shares = base([*CONTEXT, *reply])[allowed].double().softmax(0)
        for token, share in zip(allowed.tolist(), shares.tolist(), strict=True):
            pending.append((cursor.advance(token), (*reply, token), probability * share))
    return found


def is_drawn_from(counts: Counter[Any], probabilities: dict[Any, float]) -> bool:
    """Pearson's chi-square: within five standard deviations of its mean; what is rare is counted together."""
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    common = [key for key, probability in probabilities.items() if probability * total >= 5]
    cells = [(counts[key], probabilities[key] * total) for key in common]
    rest = total - sum(expected for _, expected in cells)
    if rest > 5:
        cells.append((total - sum(count for count, _ in cells), rest))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    assert freedom > 0
    return bool(statistic < freedom + 5 * (2 * freedom) ** 0.5)


def run_quickly(writer: Any, base: Base) -> None:
    """`run` without its checks, for thousands of replies."""
    cached = list(writer.reply)
    writing = writer.write(base([*CONTEXT, *cached]))
    request = next(writing, None)
    while request is not None:
        tokens, before = [*cached, *request.tokens], request
        answer = torch.stack([base([*CONTEXT, *tokens[: len(cached) + place + 1]]) for place in request.keep])
        try:
            request = writing.send(answer)
        except StopIteration:
            return
        cached = tokens[: len(tokens) - before.rejected]


class OneTool(Fixed):
    """Drafts one call where its tool was chosen, and nothing for other tools."""

    def draft(self, task: Any) -> Iterator[Any]:
        if task.scaffold.tool != self.calls[0]["name"]:
            return None
        return (yield from super().draft(task))


OTHER = {"type": "object", "properties": {"x": {"enum": [1, 2, 10]}}, "additionalProperties": False}
LIKELY = {"ok": False, "unit": "kelvin"}
UNLIKELY = {"ok": True, "unit": "fahrenheit"}


def drawn_replies(
    drafted: dict[str, Any] | None, choose: Any, writer_class: Any = CallWriter, count: int = 400
) -> tuple[bool, int]:
    """Draw replies of two names, a boolean, choices and an optional property.

    Returns:
        Whether they have the exact distribution, and how many kept the whole draft.
    """
    grammar, base = grammar_of(CLOSED, OTHER), base_of(2, scale=0.8)
    probabilities, counts, whole = exact(grammar, base), Counter[Any](), 0
    assert sum(probabilities.values()) == pytest.approx(1)
    assert len(probabilities) == 2 * 3 + 4
    drafter = None if drafted is None else OneTool([{"name": "act", "arguments": drafted}])
    for _ in range(count):
        stats = GenerationStats()
        writer = writer_class(
            grammar, CONTEXT, drafter=drafter, unchecked=False, steps=1, choose=choose, room=None, stats=stats
        )
        run_quickly(writer, base)
        counts[tuple(writer.reply)] += 1
        whole += stats.accepted_slots == 2
    return is_drawn_from(counts, probabilities), whole


@pytest.mark.parametrize("drafted", [None, LIKELY, UNLIKELY])
def test_replies_are_drawn_from_the_constrained_distribution(drafted: dict[str, Any] | None) -> None:
    fair, whole = drawn_replies(drafted, Sampler([], 11))
    assert fair
    assert (whole > 0) == (drafted is not None)


class Biased(CallWriter):  # type: ignore[misc, valid-type]
    """Draws again where the draft stood, or where it did not stand."""

    stood: bool
    choose: Any

    def accept(self, draft: Any, cursors: Any, logits: Any) -> int:
        fair = self.choose

        def choose(cursor: Any, row: Tensor) -> int:
            place, token = cursor.total - cursors[0].total, fair(cursor, row)
            again = place < len(draft) and (token == draft[place]) == self.stood
            return fair(cursor, row) if again else token

        self.choose = choose
        try:
            return super().accept(draft, cursors, logits)
        finally:
            self.choose = fair


class Eager(Biased):
    """A bias towards drafts."""

    stood = False


class Reluctant(Biased):
    """A bias against drafts."""

    stood = True


class Warm(Sampler):  # type: ignore[misc, valid-type]
    """Draws a little too evenly."""

    def draw(self, scores: Tensor) -> int:
        return super().draw(scores / 1.4)


@pytest.mark.parametrize(("choose", "writer_class"), [(Sampler, Eager), (Sampler, Reluctant), (Warm, CallWriter)])
def test_a_biased_way_of_accepting_or_drawing_would_be_noticed(choose: Any, writer_class: Any) -> None:
    """Of the test above: each of these differs from the exact distribution by more than chance."""
    assert not drawn_replies(LIKELY, choose([], 11), writer_class)[0]


@pytest.mark.parametrize("seed", range(8))
def test_one_seed_draws_one_reply_with_drafts_and_without(made_up: list[Any], seed: int) -> None:
    others: list[bool] = []
    for parameters in ([OPEN, CLOSED], [made_up[seed]], [made_up[seed + 16], OPEN]):
        grammar, base = grammar_of(*parameters, max_tool_calls=3), base_of(seed, scale=1.0 + seed % 4)
        warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.95)][: seed % 4]
        ar, forwards = reference(grammar, base, choose=Sampler(warpers, seed))
        calls = parse_calls(VOCABULARY, ar.reply)
        for drafter in (Fixed(calls), Fixed(calls, ahead=True), Wandering(grammar, seed)):
            writer = writer_of(grammar, drafter, choose=Sampler(warpers, seed))
            requests = run(writer, base)
            assert writer.reply == ar.reply
            assert len(requests) <= forwards
        others.append(reference(grammar, base, choose=Sampler(warpers, seed + 100))[0].reply != ar.reply)
    assert any(others)


def at_a_choice(grammar: Any, count: int = 2) -> Any:
    """A cursor where so many tokens or more are allowed."""
    cursor = grammar.start()
    while int(cursor.mask().sum()) < count:
        cursor = cursor.advance(cursor.mask().nonzero()[0, 0].item())
    return cursor


@pytest.mark.parametrize(
    "warpers",
    [
        [],
        [TemperatureLogitsWarper(0.5)],
        [TemperatureLogitsWarper(3.0)],
        [TopKLogitsWarper(5)],
        [TopPLogitsWarper(0.6)],
        [MinPLogitsWarper(0.2)],
        [TemperatureLogitsWarper(2.0), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ],
)
def test_draws_have_the_warped_distribution_of_what_is_allowed(warpers: list[Any]) -> None:
    """Warpers see only what the grammar allows: forbidden tokens take no place among the best."""
    torch.manual_seed(0)
    cursor, logits = at_a_choice(grammar_of(schemas.one(STRING)), 30), torch.randn(VOCABULARY.size) * 2
    logits[~cursor.mask()] += 20
    scores = logits.masked_fill(~cursor.mask(), float("-inf"))[None]
    for warper in warpers:
        scores = warper(None, scores)
    probabilities = {token: share for token, share in enumerate(scores[0].double().softmax(0).tolist()) if share > 0}
    sampler = Sampler(warpers, 5)
    assert is_drawn_from(Counter(sampler(cursor, logits) for _ in range(1500)), probabilities)


def test_sampling_the_single_best_token_is_the_reference() -> None:
    for seed in range(3):
        grammar, base = grammar_of(OPEN, CLOSED, max_tool_calls=2), base_of(seed)
        greedy, _ = reference(grammar, base)
        for warpers in ([TopKLogitsWarper(1)], [TemperatureLogitsWarper(1e-4)], [TopPLogitsWarper(1e-6)]):
            assert reference(grammar, base, choose=Sampler(warpers, seed))[0].reply == greedy.reply


@pytest.mark.parametrize("warpers", [[], [TemperatureLogitsWarper(0.01)], [TopPLogitsWarper(0.9)]])
def test_scores_out_of_range_are_drawn_from_too(warpers: list[Any]) -> None:
    cursor, chance = at_a_choice(grammar_of(schemas.one(STRING)), 30), torch.Generator().manual_seed(0)
    ordinary = torch.randn(VOCABULARY.size, generator=chance)
    for value in (float("nan"), float("inf"), float("-inf"), 3e38, -3e38):
        for logits in (torch.full_like(ordinary, value), torch.where(ordinary > 1, value, ordinary)):
            assert bool(cursor.mask()[Sampler(warpers, 0)(cursor, logits)])


def test_draws_of_low_precision_are_made_in_float32() -> None:
    cursor = at_a_choice(grammar_of(CLOSED))
    logits = torch.randn(VOCABULARY.size).bfloat16()
    assert Sampler([], 1)(cursor, logits) == Sampler([], 1)(cursor, logits.float())


# ------------------------------------------------------------------------------------------------- reading replies


def test_calls_are_found_by_the_ids_of_special_tokens() -> None:
    """Their names inside a value are text."""
    arguments = {"a": "</tool_call>\n<tool_call>"}
    grammar = grammar_of(schemas.one(STRING), max_value_tokens=100, max_call_tokens=100)
    writer = writer_of(grammar, Fixed([{"name": "act", "arguments": arguments}]), unchecked=True)
    run(writer, base_of(0))
    assert parse_calls(VOCABULARY, writer.reply) == [{"name": "act", "arguments": arguments}]
    assert parse_calls(VOCABULARY, writer.reply[:-2]) == []
    assert parse_calls(VOCABULARY, []) == []


def test_the_written_arguments_leave_half_a_character_out() -> None:
    text = '\n{"name": "act", "arguments": {"a": "é🙂'.encode()
    assert decoding.arguments_text(text) == '{"a": "é🙂'
    assert decoding.arguments_text(text[:-1]) == decoding.arguments_text(text[:-3]) == '{"a": "é'
    assert decoding.arguments_text(text[:10]) == decoding.arguments_text(b"") == ""
