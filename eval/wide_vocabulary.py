"""A byte-level tokenizer as wide as those of today's models, made in code: for measurements without a download.

Its tokens look like those of a multilingual BPE of 128,256 tokens: mostly words with and without a space in front, in
three cases, prefixes of words on the way to them, words and letters of other scripts and parts of their characters,
numbers of up to three digits, runs of spaces and punctuation.
"""

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repo_package import load_repo_module

WIDE = 128_256
"""Tokens of SmolLM3 and Llama 3."""

_SPLIT = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_COMMON = """the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said what up its about
into than them can only other new some could time these two may then do first any my now such like our over man me even
most made after also did many before must through back years where much your way well down should because each just
those people take day good how long place year number name city date country state street user file path return string
value type order price email phone address code list query search find get set create update delete send message
weather location temperature unit celsius fahrenheit currency amount London Paris York Monday January true false null
import class function const public static void self print range index error test data model key text input output"""

# Parts of syllables, the common ones first; the leading space stands for the empty part.
_ONSETS = "c s p d m r t b f l h g st n w pr tr v ch sh con re in de un cl gr br pl fr cr sp th str j k qu bl wh z y"
_NUCLEI = "e a i o u ea io ou ee ai oo ie y au oi ue"
_CODAS = " n r t s l d nt st ct m ll ss ng rt ck p nd ch sh th rd x g b mp lt ft ble w"
_ENDINGS = " s ed ing er ion ly al ity able ment ness ers ation ive ous ize ful est"
_PUNCTUATION = "_.,-=()/*\":;'{}[]<>#$|!+@\\&?%`~^"
# First character, how many characters, length of a word in characters, whether words stand behind a space, share of the
# vocabulary.
_SCRIPTS = [
    (0x4E00, 4000, 2, False, 0.05),  # Chinese
    (0x0430, 32, 5, True, 0.07),  # Cyrillic
    (0x3041, 86, 3, False, 0.02),  # Hiragana
    (0x30A1, 90, 3, False, 0.01),  # Katakana
    (0xAC00, 2000, 2, True, 0.03),  # Hangul
    (0x0627, 36, 4, True, 0.02),  # Arabic
    (0x03B1, 25, 5, True, 0.02),  # Greek
    (0x0905, 70, 3, True, 0.02),  # Devanagari
    (0x0E01, 58, 3, False, 0.02),  # Thai
    (0x1F300, 400, 1, False, 0.003),  # pictographs
    (0x00DF, 32, 3, True, 0.01),  # accented Latin
]


def wide_tokenizer(size: int = WIDE, seed: int = 0) -> PreTrainedTokenizerFast:
    """Make the tokenizer.

    Args:
        size: number of tokens, special tokens included; at least 2,000.
        seed: of the words.

    Returns:
        A byte-level tokenizer with our special tokens (the last ids), the same for the same arguments.
    """
    tokenization = load_repo_module("tokenization_utils")
    special = len(tokenization.SPECIAL_TOKENS) + len(tokenization.MARKUP_TOKENS)
    letters = _byte_letters()
    vocabulary, merges = _merges(size - special, seed)
    named = {"".join(letters[code] for code in token): index for token, index in vocabulary.items()}
    names = list(named)
    pairs = [(names[vocabulary[left]], names[vocabulary[right]]) for left, right in merges]
    # Like Llama 3's: a word that is a token is that token, whichever merges lead to it.
    tokenizer = Tokenizer(models.BPE(named, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenization.build_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=65536))


def _byte_letters() -> list[str]:
    """How byte-level BPE writes each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256))
    return [chr(code) if code in printable else chr(256 + next(others)) for code in range(256)]


def _merges(size: int, seed: int) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """Ids of exactly `size` tokens, and the merges that make them, one for each token but the bytes."""
    vocabulary = {bytes([code]): code for code in range(256)}
    merges: list[tuple[bytes, bytes]] = []
    for text in _texts(size, random.Random(seed)):
        pieces = _pieces(text.encode(), vocabulary)
        token = pieces[0]
        for piece in pieces[1:]:
            if len(vocabulary) == size:
                return vocabulary, merges
            merges.append((token, piece))
            token += piece
            vocabulary.setdefault(token, len(vocabulary))
    raise AssertionError("the texts go on for ever")


def _pieces(text: bytes, vocabulary: dict[bytes, int]) -> list[bytes]:
    """Cut a text into the longest known tokens, from the left."""
    pieces, place = [], 0
    while place < len(text):
        end = next(end for end in range(len(text), place, -1) if text[place:end] in vocabulary)
        pieces.append(text[place:end])
        place = end
    return pieces


def _texts(size: int, chance: random.Random) -> Iterator[str]:
    """Texts that shall be tokens, endlessly; the commonest kinds first."""
    yield from (f"{number:0{digits}d}" for digits in (2, 3) for number in range(10**digits))
    for length in range(2, 80):
        yield from (sign * length for sign in (" \n-=*#" if length < 20 else " -"))
    for word in _COMMON.split():
        yield from (word, f" {word}", word.title(), f" {word.title()}")
    for _ in range(size // 30):
        run = "".join(chance.choices(_PUNCTUATION, k=chance.randint(1, 3)))
        yield chance.choice(["", " "]) + run + chance.choice(["", "", "", "\n", "\n\n"])
    for first, count, length, spaced, share in _SCRIPTS:
        characters = [chr(first + index) for index in range(count)]
        weights = [1 / (index + 10) for index in range(count)]
        yield from chance.sample(characters, min(count, int(size * share / 2)))
        for _ in range(int(size * share / 2)):
            word = "".join(chance.choices(characters, weights, k=max(1, chance.randint(length - 1, length + 1))))
            yield chance.choice([" ", "", " "] if spaced else [""]) + word
    while True:
        word = "".join(_syllable(chance) for _ in range(chance.choices([1, 2, 3], [4, 5, 2])[0]))
        word += _likely(_ENDINGS, chance)
        yield chance.choice([" ", " ", "", " "]) + chance.choice([word, word, word, word.title(), word.upper()])


def _syllable(chance: random.Random) -> str:
    return _likely(_ONSETS, chance) + _likely(_NUCLEI, chance) + _likely(_CODAS, chance)


def _likely(parts: str, chance: random.Random) -> str:
    """One of the parts, those in front far more often."""
    options = parts.split(" ")
    return options[int(len(options) * chance.random() ** 2.5)]
