"""Lifted automata run tokens as bytes run, commits are the exact best strings, marginals the exact probabilities."""

import itertools
import math
import multiprocessing
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import schemas
from eval.wide_vocabulary import wide_tokenizer
from repo_package import load_repo_module
from tiny_tokenizer import tiny_tokenizer, tiny_vocabulary

bytes_module = load_repo_module("byte_automata")
grammar_module = load_repo_module("slot_grammar")
layout_module = load_repo_module("scaffold_layout")
numbers = load_repo_module("number_automata")
scaffold_module = load_repo_module("schema_scaffold")
tokenization = load_repo_module("tokenization_utils")
CanvasSlot, Leaf, Vocabulary = grammar_module.CanvasSlot, scaffold_module.Leaf, grammar_module.Vocabulary
build_canvas, slot_budget = grammar_module.build_canvas, grammar_module.slot_budget
commit_slot, commit_slots = grammar_module.commit_slot, grammar_module.commit_slots
slot_marginals = grammar_module.slot_marginals

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
NAN, INFINITY = float("nan"), float("inf")

RAW = bytes_module.raw_string_automaton()
AUTOMATA = {
    "integer": numbers.integer_automaton(),
    "number": numbers.number_automaton(short=True),
    "raw": RAW,
    "escaped": RAW.escaped,
    "long": bytes_module.at_least(RAW, 2),
    "finite": bytes_module.finite([b"", b"a", b"ab", b"abc", "é".encode(), "aé".encode(), b"ba"]),
}


@pytest.fixture(autouse=True)
def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLLM_DIFFUSION_CACHE", "")


# ------------------------------------------------------------------------------------------------- vocabulary


def test_tokens_spell_the_text_that_they_encode() -> None:
    vocabulary, tokenizer = tiny_vocabulary(), tiny_tokenizer()
    for text in (*schemas.HOSTILE_TEXTS, "New York", "日本🙂x"):
        assert vocabulary.spell(vocabulary.encode(text)) == text.encode()
        for start in range(len(text.encode())):
            assert vocabulary.spell(vocabulary.encode_bytes(text.encode()[start:])) == text.encode()[start:]
    for token in tokenizer.added_tokens_decoder:
        assert vocabulary.bytes[token] is None
    assert vocabulary.bytes[len(tokenizer) :] == [None] * 3


def test_the_bytes_of_tokens_are_those_that_the_tokenizer_decodes() -> None:
    vocabulary, tokenizer = tiny_vocabulary(), tiny_tokenizer()
    # A character in front and behind keeps pieces of characters apart from each other.
    spelled = {token: held for token, held in enumerate(vocabulary.bytes) if held}
    assert len(spelled) == len(tokenizer) - len(tokenizer.added_tokens_decoder)
    for token, held in spelled.items():
        assert tokenizer.decode([token]) == held.decode(errors="replace")


def test_names_of_special_tokens_are_plain_text() -> None:
    vocabulary = tiny_vocabulary()
    special = set(tiny_tokenizer().added_tokens_decoder)
    for name in (*tokenization.SPECIAL_TOKENS, *tokenization.MARKUP_TOKENS):
        assert not special & set(vocabulary.encode(f"a {name} b"))
        assert not special & set(vocabulary.encode_bytes(f"a {name} b".encode()))


def test_encoded_texts_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MAX_ENCODED", 20)
    vocabulary = Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()))
    for number in range(100):
        assert vocabulary.spell(vocabulary.encode(f"city {number}")) == f"city {number}".encode()
        assert len(vocabulary._encoded) <= 20


@settings(quick, max_examples=100)
@given(st.one_of(st.binary(max_size=60), schemas.texts.map(str.encode), st.just(b"x" * 100)))
def test_prefix_tokens_are_all_tokens_that_begin_a_text(text: bytes) -> None:
    vocabulary = tiny_vocabulary()
    expected = {(token, len(held)) for token, held in enumerate(vocabulary.bytes) if held and text.startswith(held)}
    found = vocabulary.prefix_tokens(text)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_tokenizer_that_does_not_spell_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="not byte-level"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 10)
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="not byte-level"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 10)
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    with pytest.raises(ValueError, match="no token for byte 0x00"):
        Vocabulary(PreTrainedTokenizerFast(tokenizer_object=letters), 10)


def test_a_model_smaller_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()) - 1)


# ------------------------------------------------------------------------------------------------- lifting


def run_bytes(automaton: Any, state: int, text: bytes) -> tuple[int, int]:
    """The state behind a text or -1, and the characters that it begins."""
    chars = 0
    for code in text:
        chars += bool(automaton.counting[state]) and code & 0xC0 != 0x80
        state = int(automaton.transitions[state, code])
        if state < 0:
            return -1, 0
    return state, chars


@pytest.mark.parametrize("kind", AUTOMATA)
def test_lifted_automata_run_tokens_as_the_bytes_run(kind: str) -> None:
    vocabulary, automaton = tiny_vocabulary(), AUTOMATA[kind]
    lifted = vocabulary.lift(automaton)
    assert vocabulary.lift(automaton) is lifted
    assert len(lifted.token_class) == vocabulary.size
    for state in range(len(automaton.accepting)):
        assert lifted.accepts(state) == automaton.accepting[state]
        for token, spelled in enumerate(vocabulary.bytes):
            expected = run_bytes(automaton, state, spelled) if spelled else (-1, 0)
            assert lifted.step(state, token) == expected


@pytest.mark.parametrize("kind", AUTOMATA)
def test_a_value_is_allowed_what_leaves_it_room_to_end(kind: str) -> None:
    vocabulary, automaton, chance = tiny_vocabulary(), AUTOMATA[kind], random.Random(0)
    lifted = vocabulary.lift(automaton)
    for state in chance.sample(range(len(automaton.accepting)), min(8, len(automaton.accepting))):
        after, chars = np.array([lifted.step(state, token) for token in range(vocabulary.size)]).T
        needed = int(automaton.chars_needed[state])
        for room, chars_left in itertools.product((-3, 0, 1, 2, 5, 1000), (None, needed, needed + 1, needed + 3, 999)):
            mask = lifted.allowed(state, room, chars_left)
            assert mask is lifted.allowed(state, room, chars_left)
            limit = max(room - 1, int(automaton.bytes_needed[state]) - 1)
            expected = (after >= 0) & (automaton.bytes_needed[after] <= limit)
            if chars_left is not None:
                expected &= chars + automaton.chars_needed[after] <= chars_left
            assert mask.tolist() == expected.tolist()
            assert lifted.grows(state, chars_left) == bool(lifted.allowed(state, 1000, chars_left).any())
    assert len(lifted._masks) <= grammar_module._MAX_MASKS


@pytest.mark.parametrize("kind", AUTOMATA)
def test_values_end_within_their_room_whatever_is_chosen(kind: str) -> None:
    """Some walk on at random, some love the longest tokens; all accept at the end, within characters and room."""
    vocabulary, automaton, chance = tiny_vocabulary(), AUTOMATA[kind], random.Random(0)
    lifted = vocabulary.lift(automaton)
    for _ in range(60):
        limit = int(automaton.chars_needed[0]) + chance.randint(0, 6) if chance.random() < 0.7 else None
        budget, state, used, tokens = chance.randint(0, 6), 0, 0, 0
        while not lifted.accepts(state) or chance.random() < 0.8:
            allowed = lifted.allowed(state, budget - tokens, None if limit is None else limit - used)
            able = allowed.nonzero()[:, 0].tolist()
            if not able:
                break
            state, chars = lifted.step(state, chance.choice(able))
            used, tokens = used + chars, tokens + 1
        assert lifted.accepts(state)
        assert limit is None or used <= limit
        # Behind its room a value only takes what it needs.
        assert tokens <= max(budget, 1) + int(automaton.bytes_needed.max())


def test_a_language_over_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_LIFT_CELLS", 300)
    vocabulary = Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()))
    with pytest.raises(bytes_module.AutomatonTooLarge, match="300 cells"):
        vocabulary.lift(AUTOMATA["number"])


def test_old_lifts_leave_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()))
    first = vocabulary.lift(AUTOMATA["integer"])
    assert first.nbytes > 4 * vocabulary.size
    monkeypatch.setattr(grammar_module, "_LIFTED_BYTES", 3 * first.nbytes)
    languages = [bytes_module.finite([bytes([code])]) for code in range(65, 75)]
    for language in languages:
        vocabulary.lift(AUTOMATA["integer"])  # in use all the time
        vocabulary.lift(language)
    assert vocabulary.lift(AUTOMATA["integer"]) is first
    assert 1 < len(vocabulary._lifted) <= 3
    assert languages[0] not in vocabulary._lifted


@cache
def wide_vocabulary() -> Any:
    tokenizer = wide_tokenizer(3000)
    return Vocabulary(tokenizer, len(tokenizer))


def test_the_wide_tokenizer_is_ours_and_always_the_same() -> None:
    one, other = wide_tokenizer(3000), wide_tokenizer(3000)
    assert one.get_vocab() == other.get_vocab()
    assert len(one) == 3000
    for text in ('{"city": "New York", "n": 12345}', "日本🙂 привет नमस्ते\n\n\t ¬", "<tool_call>"):
        ids = one(tokenization.escape_content(text), add_special_tokens=False)["input_ids"]
        assert one.decode(ids) == text
    assert set(tokenization.SPECIAL_TOKENS + tokenization.MARKUP_TOKENS) <= set(one.get_vocab())
    # As in real ones there are words, pieces of characters, and words behind a space.
    spelled = [held for held in wide_vocabulary().bytes if held]
    assert b" the" in spelled
    assert any(held.decode(errors="ignore").encode() != held and len(held) > 1 for held in spelled)


# ------------------------------------------------------------------------------------------------- lifts on disk


def tables_of(lifted: Any) -> list[np.ndarray]:
    return [lifted.token_class, lifted.transitions, lifted.chars, lifted.accepting, lifted.bytes_needed]


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(tables_of(one), tables_of(other), strict=True)
    )


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which every lift is kept."""
    monkeypatch.setenv("SMOLLM_DIFFUSION_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(grammar_module, "_MIN_STORED", 0)
    return tmp_path / "deep" / "cache"


def fresh_vocabulary() -> Any:
    return Vocabulary(tiny_tokenizer(), len(tiny_tokenizer()) + 3)


def test_a_lift_is_read_from_disk_the_second_time(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {kind: tiny_vocabulary().lift(automaton) for kind, automaton in AUTOMATA.items()}
    for kind, automaton in AUTOMATA.items():
        assert same(fresh_vocabulary().lift(automaton), expected[kind])
    assert len(list(disk.iterdir())) == len(AUTOMATA)
    monkeypatch.setattr(grammar_module, "_lift", None)  # calling it would fail
    vocabulary = fresh_vocabulary()
    for kind, automaton in AUTOMATA.items():
        lifted = vocabulary.lift(automaton)
        assert same(lifted, expected[kind])
        assert bool(lifted.allowed(0, 5, None).equal(expected[kind].allowed(0, 5, None)))


def test_files_belong_to_one_automaton_and_one_vocabulary(disk: Path) -> None:
    fresh_vocabulary().lift(AUTOMATA["integer"])
    wide = wide_tokenizer(3000)
    lifted = Vocabulary(wide, len(wide)).lift(AUTOMATA["integer"])
    fresh_vocabulary().lift(AUTOMATA["raw"])
    assert len(list(disk.iterdir())) == 3
    assert len(lifted.token_class) == 3000


def test_what_is_broken_on_disk_is_made_anew(disk: Path) -> None:
    good = fresh_vocabulary().lift(AUTOMATA["integer"])
    fresh_vocabulary().lift(AUTOMATA["raw"])
    files = {path: path.read_bytes() for path in disk.iterdir()}
    path, foreign = (next(p for p in files if files[p] is held) for held in files.values())
    content = files[path]
    flipped = bytearray(content)
    flipped[-1] ^= 1
    for damaged in (b"", b"x", content[: len(content) // 2], bytes(flipped), files[foreign], b"\xff" * 100):
        path.write_bytes(damaged)
        assert same(fresh_vocabulary().lift(AUTOMATA["integer"]), good)
        assert same(fresh_vocabulary().lift(AUTOMATA["raw"]), tiny_vocabulary().lift(RAW))
        assert path.read_bytes() == content, "it is written again"


def test_without_a_folder_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MIN_STORED", 0)
    (tmp_path / "file").write_text("no folder")
    warnings: list[str] = []
    monkeypatch.setattr(grammar_module.logger, "warning_once", warnings.append)
    for folder in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        monkeypatch.setenv("SMOLLM_DIFFUSION_CACHE", folder)
        assert same(fresh_vocabulary().lift(RAW), tiny_vocabulary().lift(RAW))
    assert len(warnings) == 2
    assert all("SMOLLM_DIFFUSION_CACHE" in warning for warning in warnings)
    assert (tmp_path / "file").read_text() == "no folder"


def test_the_folder_is_below_the_hugging_face_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMOLLM_DIFFUSION_CACHE")
    monkeypatch.setattr(grammar_module.hub, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(grammar_module, "_MIN_STORED", len(RAW.accepting) * fresh_vocabulary().size)
    fresh_vocabulary().lift(AUTOMATA["integer"])  # smaller, so not worth a file
    assert list(tmp_path.iterdir()) == []
    fresh_vocabulary().lift(RAW)
    assert [path.suffix for path in (tmp_path / "smollm_diffusion").iterdir()] == [".safetensors"]


def test_the_oldest_files_go(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_MAX_FILES", 3)
    written: list[Path] = []
    for code in range(65, 72):
        fresh = fresh_vocabulary()
        fresh.lift(bytes_module.finite([bytes([code])]))
        (new,) = set(disk.iterdir()) - set(written)
        os.utime(new, (code, code))
        written.append(new)
    assert set(disk.iterdir()) == set(written[-3:])


def _lift_often(barrier: Any, seed: int, results: Any) -> None:
    """Lift all kinds again and again, as one of several processes; now and then break a file."""
    chance = random.Random(seed)
    expected = {kind: tables_of(tiny_vocabulary().lift(automaton)) for kind, automaton in AUTOMATA.items()}
    vocabulary = fresh_vocabulary()
    folder = grammar_module._cache_folder()
    barrier.wait()
    wrong = 0
    for _ in range(60):
        vocabulary._lifted.clear()
        kind = chance.choice(list(AUTOMATA))
        tables = tables_of(vocabulary.lift(AUTOMATA[kind]))
        wrong += not all(np.array_equal(a, b) for a, b in zip(tables, expected[kind], strict=True))
        finished = sorted(file for file in folder.iterdir() if file.suffix == ".safetensors")
        if finished and chance.random() < 0.2:
            victim = chance.choice(finished)
            if chance.random() < 0.5:
                victim.unlink(missing_ok=True)
            else:
                broken = folder.parent / f"broken{seed}"  # beside the folder, where no other process finds it
                broken.write_bytes(b"nonsense")
                os.replace(broken, victim)
    results.put(wrong)


def test_several_processes_share_the_folder(disk: Path) -> None:
    context = multiprocessing.get_context("fork")
    tiny_vocabulary()
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_lift_often, args=(barrier, seed, results)) for seed in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [0] * 4
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert not list(disk.glob("*.tmp")), "no half-written file is left"


# ------------------------------------------------------------------------------------------------- joint commits

# Few tokens, so that all strings of a slot can be tried; None stands for a special token.
SMALL: dict[str, list[bytes | None]] = {
    "integer": [b"0", b"1", b"-", b"10", None, b"-1", b"."],
    "number": [b"0", b"5", b"-", b".", b".0", b"0.", None],
    "raw": [b"a", "é".encode(), b"\xc3", b"\xa9", b"\x00", None, b"ab\xc3", b"\xa9b"],
    "long": [b"a", b"ab", b"\xc3", b"\xa9", None, b"abc"],
    "finite": [b"a", b"b", b"c", b"ab", b"bc", b"\xc3", b"\xa9", None],
    # More than half of the tokens have one label, which is found in another way.
    "wide": [b"a", b"b", b"ab", b"\xc3", None, b"\xa9", b"abc"],
}
LANGUAGES = AUTOMATA | {"wide": RAW}


def small_slot(kind: str, length: int, max_length: int | None = None) -> tuple[Any, list[bytes | None]]:
    tokens, automaton = SMALL[kind], LANGUAGES[kind]
    tables = grammar_module._lift(automaton, grammar_module._trie(tokens), len(tokens))
    lifted = grammar_module.TokenAutomaton(
        **tables,
        accepting=automaton.accepting,
        chars_needed=automaton.chars_needed,
        bytes_needed=automaton.bytes_needed,
        device=torch.device("cpu"),
    )
    return CanvasSlot(None, 0, length, lifted, None, max_length), tokens


@cache
def strings_of(kind: str, length: int, max_length: int | None) -> torch.Tensor:
    """int64 [strings, length], found by trying all: tokens of an accepted text, then NULL; or tokens of a beginning."""
    tokens, automaton = SMALL[kind], LANGUAGES[kind]
    null, found = len(tokens) + 1, []
    for used in range(length + 1):
        for content in itertools.product(range(len(tokens)), repeat=used):
            spelled = [tokens[token] for token in content]
            if None in spelled:
                continue
            state, chars = run_bytes(automaton, 0, b"".join(part or b"" for part in spelled))
            if state < 0 or (used < length and not automaton.accepting[state]):
                continue
            if max_length is None or chars + int(automaton.chars_needed[state]) <= max_length:
                found.append([*content, *[null] * (length - used)])
    return torch.tensor(found)


def fitting(strings: torch.Tensor, fixed: Sequence[int]) -> torch.Tensor:
    """The strings that have the fixed positions."""
    wanted = torch.tensor(fixed)
    return strings[((wanted < 0) | (strings == wanted)).all(1)]


def totals(scores: torch.Tensor, strings: torch.Tensor, fixed: Sequence[int]) -> torch.Tensor:
    """float64 [strings], their scores; fixed positions count nothing."""
    return (scores.gather(1, strings.T) * (torch.tensor(fixed) < 0)[:, None]).sum(0)


def random_scores(generator: torch.Generator, length: int, width: int, hostile: bool) -> torch.Tensor:
    scores = torch.randn(length, width, generator=generator) * 3
    if hostile:
        scores[torch.rand(length, width, generator=generator) < 0.3] = NAN
        scores[torch.rand(length, width, generator=generator) < 0.2] = -INFINITY
        scores[torch.rand(length, width, generator=generator) < 0.1] = INFINITY
    return scores


def bounded(scores: torch.Tensor) -> torch.Tensor:
    """What is infinite or not a number counts as an extreme, finite score."""
    return scores.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4).clamp(-1e4, 1e4).double()


def fixings(chance: random.Random, strings: torch.Tensor, tokens: int) -> list[list[int]]:
    """Nothing fixed, a part of a string, and anything."""
    length = strings.shape[1]
    anything = [chance.choice([-1, -1, chance.randrange(tokens), tokens + 1]) for _ in range(length)]
    known = strings[chance.randrange(len(strings))].tolist()
    return [[-1] * length, [chance.choice([-1, token]) for token in known], anything]


LIMITS = [("raw", 3), ("wide", 2), ("long", 3), ("long", 2), ("raw", 0), ("finite", 1), ("wide", 1000)]
CASES = [*((kind, None) for kind in SMALL), *LIMITS]


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("kind", "max_length"), CASES)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_open_commits_equal_brute_force(kind: str, max_length: int | None, length: int, hostile: bool) -> None:
    slot, tokens = small_slot(kind, length, max_length)
    strings, null = strings_of(kind, length, max_length), len(tokens) + 1
    longer = {tuple(row[:length]) for row in strings_of(kind, length + 1, max_length).tolist() if row[length] != null}
    generator, chance, contradictions = torch.Generator().manual_seed(length), random.Random(length), 0
    for _ in range(7):
        log_probs = random_scores(generator, length, null + 1, hostile)
        for fixed in fixings(chance, strings, len(tokens)):
            commit = commit_slot(slot, log_probs, torch.tensor(fixed), null)
            scores, rows = bounded(log_probs), fitting(strings, fixed)
            if len(rows) == 0:
                assert commit is None
                contradictions += 1
                continue
            assert commit is not None
            found = commit.tokens.tolist()
            assert found in rows.tolist()
            best = float(totals(scores, rows, fixed).max())
            assert math.isclose(float(totals(scores, commit.tokens[None], fixed)), best, rel_tol=1e-9, abs_tol=1e-9)
            assert math.isclose(commit.score, best, rel_tol=1e-9, abs_tol=1e-9)
            assert commit.overflow == (tuple(found) in longer)
            assert commit.confidence.shape == (length,)
            for place, (token, want) in enumerate(zip(found, fixed, strict=True)):
                expected = 1.0 if want >= 0 else math.exp(min(0.0, float(scores[place, token])))
                assert math.isclose(float(commit.confidence[place]), expected, rel_tol=1e-5)
    assert contradictions > 0 or length == 1 or kind == "finite"


def test_equal_tokens_give_way_to_the_smallest_id() -> None:
    for kind in ("wide", "raw", "integer"):
        slot, tokens = small_slot(kind, 2)
        scores = torch.zeros(2, len(tokens) + 2)
        scores[:, -1] = -1.0  # no NULL, so that every string has two tokens
        commit = commit_slot(slot, scores, torch.tensor([-1, -1]), len(tokens) + 1)
        label = slot.automaton.token_class[commit.tokens.numpy()]
        for place in range(2):
            same_class = np.flatnonzero(slot.automaton.token_class == label[place])
            assert int(commit.tokens[place]) == int(same_class[0])


def test_a_value_that_is_not_over_at_the_last_position_overflows() -> None:
    vocabulary, null = tiny_vocabulary(), tiny_vocabulary().size + 1
    one = bytes_module.finite([b"abcd"])
    for automaton, max_length, text, overflow in [
        (RAW, None, "abcd", True),  # may go on
        (RAW, 4, "abcd", False),  # has all its characters
        (RAW, 5, "abcd", True),
        (bytes_module.at_least(RAW, 9), None, "abcd", True),  # must go on
        (one, None, "abcd", False),
    ]:
        tokens = [vocabulary.prefix_tokens(letter.encode())[0][0] for letter in text]
        slot = CanvasSlot(None, 0, 4, vocabulary.lift(automaton), None, max_length)
        scores = torch.full((4, null + 1), -9.0)
        scores[range(4), tokens] = 0.0
        commit = commit_slot(slot, scores, torch.full((4,), -1), null)
        assert commit.tokens.tolist() == tokens
        assert commit.overflow == overflow
        canvas = grammar_module.Canvas(vocabulary, None, torch.zeros(0), (slot,), null - 1, null)
        assert canvas.overflows(slot, commit.tokens) == overflow
        assert not canvas.overflows(slot, torch.tensor([*tokens[:3], null]))


def test_the_text_of_an_overflowing_slot_ends_with_a_whole_character() -> None:
    vocabulary, null = tiny_vocabulary(), tiny_vocabulary().size + 1
    slot = CanvasSlot(None, 0, 3, vocabulary.lift(RAW), None)
    canvas = grammar_module.Canvas(vocabulary, None, torch.zeros(0), (slot,), null - 1, null)
    for text, end, expected in [("a🙂", 2, "a"), ("a🙂", 4, "a"), ("é", 1, ""), ("aé", 3, "aé")]:
        tokens = [vocabulary.prefix_tokens(bytes([code]))[0][0] for code in text.encode()[:end]]
        assert canvas.text(slot, torch.tensor(tokens)) == expected
        assert canvas.text(slot, torch.tensor([*tokens, null])) == expected


def choice_slot(choices: Sequence[str]) -> Any:
    vocabulary = tiny_vocabulary()
    table = grammar_module._choice_table(vocabulary, choices, vocabulary.size + 1)
    return CanvasSlot(None, 0, table.shape[1], None, table)


CHOICES = ("celsius", "cel", "kelvin", "", "c", 'a"b', "<tool_call>")


@pytest.mark.parametrize("hostile", [False, True])
def test_choice_commits_equal_brute_force(hostile: bool) -> None:
    null, slot = tiny_vocabulary().size + 1, choice_slot(CHOICES)
    chance, nothing = random.Random(0), [-1] * slot.length
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        log_probs = random_scores(generator, slot.length, null + 1, hostile)
        fixed = [chance.choice([-1, -1, token]) for token in chance.choice(slot.choices.tolist())]
        commit = commit_slot(slot, log_probs, torch.tensor(fixed), null)
        assert commit is not None
        assert not commit.overflow
        rows = fitting(slot.choices, fixed)
        assert commit.tokens.tolist() in rows.tolist()
        # Positions that are fixed are the same in all that fit, so counting them changes no comparison.
        best = float(totals(bounded(log_probs), rows, nothing).max())
        assert math.isclose(float(totals(bounded(log_probs), commit.tokens[None], nothing)), best, rel_tol=1e-9)
        assert 0 <= float(commit.confidence[0]) <= 1
    impossible = torch.full((slot.length,), null + 5)
    assert commit_slot(slot, torch.zeros(slot.length, null + 1), impossible, null) is None
    assert slot_marginals(slot, torch.zeros(slot.length, null + 1), impossible, null) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_slots_at_once_are_committed_as_each_alone(dtype: torch.dtype) -> None:
    vocabulary, null, chance = tiny_vocabulary(), tiny_vocabulary().size + 1, random.Random(0)
    slots = [choice_slot(CHOICES), choice_slot(("true", "false"))]
    for kind, length, limit in itertools.product(("integer", "raw", "long"), (3, 6), (None, 7, 7)):
        slots.append(CanvasSlot(None, 0, length, vocabulary.lift(AUTOMATA[kind]), None, limit))
    chance.shuffle(slots)
    rows = [random_scores(torch.Generator().manual_seed(i), s.length, null + 1, False) for i, s in enumerate(slots)]
    rows = [row.to(dtype).requires_grad_(chance.random() < 0.5) for row in rows]
    fixed = [torch.full((slot.length,), -1) for slot in slots]
    for slot, known in zip(slots, fixed, strict=True):
        if slot.automaton is not None and chance.random() < 0.5:
            known[-1] = null
    fixed[0][0] = null + 7  # in no string
    together = commit_slots(slots, rows, fixed, null)
    assert together[0] is None
    for slot, row, known, commit in zip(slots[1:], rows[1:], fixed[1:], together[1:], strict=True):
        alone = commit_slot(slot, row, known, null)
        assert alone.tokens.tolist() == commit.tokens.tolist()
        assert alone.tokens.dtype == torch.int64
        assert alone.confidence.equal(commit.confidence)
        assert (alone.score, alone.overflow) == (commit.score, commit.overflow)
    assert commit_slots([], [], [], null) == []


@pytest.mark.gpu
def test_a_gpu_commits_what_the_cpu_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = wide_tokenizer(3000)
    here, there = wide_vocabulary(), Vocabulary(tokenizer, len(tokenizer), "cuda")
    null, chance = here.size + 1, random.Random(0)
    for automaton, limit in itertools.product(AUTOMATA.values(), (None, 9)):
        slots = [CanvasSlot(None, 0, 5, place.lift(automaton), None, limit) for place in (here, there)]
        assert slots[1].automaton.allowed(0, 3, limit).device.type == "cuda"
        assert slots[1].automaton.allowed(0, 3, limit).tolist() == slots[0].automaton.allowed(0, 3, limit).tolist()
        for _ in range(5):
            scores, fixed = random_scores(torch.Generator(), 5, null + 1, chance.random() < 0.5), torch.full((5,), -1)
            fixed[4] = chance.choice([-1, null])
            one = commit_slot(slots[0], scores, fixed, null)
            other = commit_slot(slots[1], scores.cuda(), fixed.cuda(), null)
            assert one.tokens.tolist() == other.tokens.tolist()
            assert other.confidence.device.type == "cuda"
            expected = slot_marginals(slots[0], scores, fixed, null)
            found = slot_marginals(slots[1], scores.cuda(), fixed.cuda(), null)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-5)
            with monkeypatch.context() as patch:
                patch.setattr(grammar_module, "NO_FLOAT64", ("cuda",))
                moved = slot_marginals(slots[1], scores.cuda(), fixed.cuda(), null)
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


class Single(torch.Tensor):
    """What a device without float64 holds."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, "this device has no float64"
        return result


@pytest.mark.parametrize("kind", ["open", "choices"])
def test_marginals_need_no_float64_on_a_device_that_has_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_where_float64_is", lambda rows: rows.as_subclass(torch.Tensor))
    slot, tokens = small_slot("long", 4, None)
    null = len(tokens) + 1
    if kind == "choices":
        slot = CanvasSlot(None, 0, 4, None, torch.tensor([[0, 1, null, null], [1, null, null, null]]), None)
    scores, fixed = random_scores(torch.Generator(), 4, null + 1, False), torch.full((4,), -1)
    found = slot_marginals(slot, scores.as_subclass(Single), fixed, null)
    torch.testing.assert_close(found, slot_marginals(slot, scores, fixed, null))


def test_a_huge_limit_leaves_out_long_tokens_and_stays_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    slot, tokens = small_slot("long", 6, 8)
    null, lifted = len(tokens) + 1, slot.automaton
    steps = {
        (s, int(lifted.transitions[s, c]), int(lifted.chars[s, c])) for s, c in np.argwhere(lifted.transitions >= 0)
    }
    # Room for the steps of one and two characters, with any number of characters before them.
    monkeypatch.setattr(grammar_module, "_MAX_COUNTED", 9 * sum(chars < 3 for _, _, chars in steps))
    grammar_module._counted_steps.cache_clear()
    scores = torch.full((6, null + 1), -9.0)
    scores[:, tokens.index(b"abc")] = 0.0
    commit = commit_slot(slot, scores, torch.full((6,), -1), null)
    spelled = b"".join(tokens[token] or b"" for token in commit.tokens.tolist() if token != null)
    assert 2 <= len(spelled.decode(errors="ignore")) <= 8
    assert tokens.index(b"abc") not in commit.tokens.tolist()
    grammar_module._counted_steps.cache_clear()


def test_commits_out_of_order_over_four_steps_are_always_valid() -> None:
    """Positions are committed in any order, under scores that change at every step; the slot stays a value."""
    vocabulary, null, chance = tiny_vocabulary(), tiny_vocabulary().size + 1, random.Random(0)
    runs, overflows = 0, 0
    for kind, automaton in AUTOMATA.items():
        for _ in range(70):
            length = chance.randint(1, 9)
            limit = chance.choice([None, int(automaton.chars_needed[0]) + chance.randint(0, 12)])
            slot = CanvasSlot(None, 0, length, vocabulary.lift(automaton), None, limit)
            fixed = torch.full((length,), -1)
            for step in range(4):
                commit = commit_slot(slot, torch.randn(length, null + 1) * 4, fixed, null)
                assert commit is not None, "what was committed can always be completed"
                free = (fixed < 0).nonzero()[:, 0].tolist()
                chosen = chance.sample(free, math.ceil(len(free) / (4 - step)))
                fixed[chosen] = commit.tokens[chosen]
            tokens = fixed.tolist()
            content = list(itertools.takewhile(lambda token: token != null, tokens))
            assert set(tokens[len(content) :]) <= {null}, "NULL never precedes content"
            state, used = run_bytes(automaton, 0, vocabulary.spell(content))
            assert state >= 0
            assert limit is None or used + int(automaton.chars_needed[state]) <= limit
            canvas = grammar_module.Canvas(vocabulary, None, torch.zeros(0), (slot,), null - 1, null)
            overflows += canvas.overflows(slot, fixed)
            assert automaton.accepting[state] or canvas.overflows(slot, fixed), kind
            runs += 1
    assert runs >= 400
    assert 0 < overflows < runs


# ------------------------------------------------------------------------------------------------- marginals


def marginals_by_trying(scores: torch.Tensor, strings: torch.Tensor, fixed: Sequence[int]) -> torch.Tensor:
    """Probability of each token at each position, from the probabilities of all strings."""
    shares = totals(scores, strings, fixed).softmax(0)
    return torch.zeros_like(scores).scatter_add_(1, strings.T, shares.expand(len(scores), -1))


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize(("kind", "max_length"), CASES)
@pytest.mark.parametrize("length", [1, 4])
def test_marginals_equal_enumeration(kind: str, max_length: int | None, length: int, hostile: bool) -> None:
    slot, tokens = small_slot(kind, length, max_length)
    strings, null = strings_of(kind, length, max_length), len(tokens) + 1
    generator, chance = torch.Generator().manual_seed(length), random.Random(length)
    for _ in range(7):
        log_probs = random_scores(generator, length, null + 1, hostile)
        for fixed in fixings(chance, strings, len(tokens)):
            marginals = slot_marginals(slot, log_probs, torch.tensor(fixed), null)
            rows = fitting(strings, fixed)
            if len(rows) == 0:
                assert marginals is None
                continue
            assert marginals.dtype == torch.float32
            assert marginals.shape == log_probs.shape
            expected = marginals_by_trying(bounded(log_probs), rows, fixed)
            torch.testing.assert_close(marginals.double(), expected, rtol=1e-3, atol=1e-5)


def test_marginals_of_choices_equal_enumeration() -> None:
    null, slot, chance = tiny_vocabulary().size + 1, choice_slot(CHOICES), random.Random(0)
    for seed in range(20):
        log_probs = random_scores(torch.Generator().manual_seed(seed), slot.length, null + 1, seed % 2 == 0)
        fixed = [chance.choice([-1, -1, token]) for token in chance.choice(slot.choices.tolist())]
        marginals = slot_marginals(slot, log_probs, torch.tensor(fixed), null)
        expected = marginals_by_trying(bounded(log_probs), fitting(slot.choices, fixed), [-1] * slot.length)
        torch.testing.assert_close(marginals.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", AUTOMATA)
def test_marginals_of_a_whole_vocabulary_are_probabilities(kind: str) -> None:
    vocabulary, null = wide_vocabulary(), wide_vocabulary().size + 1
    for limit in (None, 9):
        slot = CanvasSlot(None, 0, 6, vocabulary.lift(AUTOMATA[kind]), None, limit)
        log_probs = (torch.randn(6, null + 1) * 3).log_softmax(1)
        fixed = torch.full((6,), -1)
        fixed[5] = null
        marginals = slot_marginals(slot, log_probs, fixed, null)
        torch.testing.assert_close(marginals.sum(1), torch.ones(6))
        assert bool((marginals >= 0).all())
        refused = torch.from_numpy(slot.automaton.token_class == 0)
        assert float(marginals[:, : null - 1][:, refused].abs().max()) == 0.0
        # The best string is one of them: none of its tokens is impossible.
        commit = commit_slot(slot, log_probs, fixed, null)
        assert bool((marginals.gather(1, commit.tokens[:, None]) > 0).all())


# ------------------------------------------------------------------------------------------------- the canvas


def open_leaf(automaton: Any, max_length: int | None = None) -> Any:
    return Leaf("string", "/a", True, automaton=automaton, max_length=max_length)


def test_a_finite_language_gets_the_smallest_bucket_that_holds_it() -> None:
    def texts(size: int) -> Any:
        return bytes_module.finite([b"x" * size, b"y"])

    for size, budget in [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 24), (500, 24)]:
        assert slot_budget(open_leaf(texts(size)), 24) == budget
    assert slot_budget(open_leaf(RAW), 24) == 24
    assert slot_budget(open_leaf(RAW, 2), 24) == 8, "two characters have eight bytes at most"
    assert slot_budget(open_leaf(RAW, 17), 24) == 24


@settings(quick, max_examples=40)
@given(schemas.fitted_parameters())
def test_a_canvas_holds_fixed_text_and_slots_in_reading_order(fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters, arguments = fitted
    vocabulary = tiny_vocabulary()
    mask, null = vocabulary.size, vocabulary.size + 1
    layout = layout_module.draft_layout(scaffold_module.compile_scaffold(schemas.tool(parameters)), 6)
    canvas = build_canvas(vocabulary, layout, {"string": 40, "integer": 40, "number": 40}, mask, null)
    ids = canvas.token_ids.tolist()
    assert ids[0] == vocabulary.call_start
    assert ids[-1] == vocabulary.call_end
    place = 0
    for slot in canvas.slots:
        assert mask not in ids[place : slot.start]
        assert ids[slot.positions] == [mask] * slot.length
        place = slot.start + slot.length
    assert mask not in ids[place:]
    texts = layout.texts(arguments)
    for slot, text in zip(canvas.slots, texts, strict=True):
        tokens = canvas.tokens_of(slot, text)
        assert len(tokens) == slot.length
        if canvas.overflows(slot, tokens):
            assert slot.slot.leaf.kind != "choice"
        elif text is not None:
            assert canvas.text(slot, tokens) == text
            # What is known is what is committed, whatever the scores say.
            commit = commit_slot(slot, torch.zeros(slot.length, null + 1), tokens, null)
            assert commit is not None
            assert commit.tokens.tolist() == tokens.tolist()


@settings(quick, max_examples=40)
@given(schemas.parameter_schemas)
def test_random_commits_assemble_to_valid_arguments(parameters: dict[str, Any]) -> None:
    vocabulary = tiny_vocabulary()
    null = vocabulary.size + 1
    layout = layout_module.draft_layout(scaffold_module.compile_scaffold(schemas.tool(parameters)), 3)
    canvas = build_canvas(vocabulary, layout, {"string": 6, "integer": 5, "number": 5}, vocabulary.size, null)
    texts: list[str] = []
    for slot in canvas.slots:
        fixed = torch.full((slot.length,), -1)
        commit = commit_slot(slot, torch.randn(slot.length, null + 1) * 3, fixed, null)
        if commit.overflow:
            fixed[-1] = null
            commit = commit_slot(slot, torch.randn(slot.length, null + 1) * 3, fixed, null)
        texts.append(canvas.text(slot, commit.tokens))
    assert list(Draft202012Validator(parameters).iter_errors(layout.assemble(texts))) == []
