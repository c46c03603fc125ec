"""Which JSON Schema keywords which engine guarantees: `python -m eval.schema_coverage`.

Puts every probe of `eval.schema_probes` to this repository's grammar and to those public engines that are installed,
each in a process of its own with bounded time and memory. Writes a table and the results; measures no speed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.schema_probes import PROBES, SECTIONS, Probe
from repo_package import ROOT, load_repo_module

SECONDS = 20.0
"""Time limit of one probe: compilation and all its texts."""
START_SECONDS = 120.0
"""Time limit of an engine's start: its imports."""
MEMORY_BYTES = 12 << 30
"""Address space of an engine's process."""

RESULTS = {
    "yes": "accepts every text that fits and rejects every other",
    "refuses": "a clear error: the schema is not supported, and nothing wrong can come out",
    "incomplete": "rejects a text that fits",
    "ignores": "**accepts a text that does not fit**, without an error",
    "error": "crashes, or exceeds the limits of time or memory",
}
"""Results of a probe, best first, and what they mean."""

Matcher = Callable[[str], bool]
"""Whether a JSON text of arguments is accepted, from its first to its last byte."""
Compiler = Callable[[dict[str, Any]], Matcher]
"""A parameters schema to its matcher."""


class Refused(Exception):
    """An engine said that it does not support a schema."""


@dataclass(frozen=True)
class Outcome:
    """What an engine made of a probe.

    Args:
        result: one of `RESULTS`.
        detail: the engine's message, where it gave one.
        false_accepts, false_rejects: the texts that it took for the wrong kind.
    """

    result: str
    detail: str = ""
    false_accepts: tuple[str, ...] = ()
    false_rejects: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Engines. All of them see bytes as tokens, so that a text has one spelling and the verdict is that of the grammar.
# ---------------------------------------------------------------------------------------------------------------------

_BYTES = [bytes([code]) for code in range(256)]
_STOP = 256
LLGUIDANCE_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""What makes llguidance write JSON as `json.dumps` does."""


def this_repository() -> Compiler:
    """The scaffold and the reply grammar of this repository."""
    scaffolds, grammars = load_repo_module("schema_scaffold"), load_repo_module("reply_grammar")
    tokenizer = load_repo_module("tokenization_utils").train_tokenizer([], vocab_size=len(_BYTES) + 11)
    vocabulary = load_repo_module("slot_grammar").Vocabulary(tokenizer, len(tokenizer))
    end = [vocabulary.call_end, vocabulary.im_end]
    unbounded = 1 << 20  # the limits of a reply's length are not what is probed

    def compiler(parameters: dict[str, Any]) -> Matcher:
        tool = {"type": "function", "function": {"name": "act", "parameters": parameters}}
        try:
            scaffold = scaffolds.compile_scaffold(tool)
        except scaffolds.UnsupportedSchemaError as error:
            raise Refused(str(error)) from None
        grammar = grammars.ReplyGrammar(vocabulary, [scaffold], 1, unbounded, unbounded)

        def matches(text: str) -> bool:
            reply = [*vocabulary.encode_bytes(f'act", "arguments": {text}}}\n'.encode()), *end]
            cursor = grammar.start()
            for token in reply:
                cursor = cursor.advance(token)
                if cursor is None:
                    return False
            return cursor.finished

        return matches

    return compiler


def llguidance() -> Compiler:
    """llguidance with the separators of `json.dumps`; nothing lenient."""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    class Bytes:
        tokens = [*_BYTES, b"<stop>"]
        eos_token_id = _STOP
        bos_token_id = None
        special_token_ids = [_STOP]

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

    def compiler(parameters: dict[str, Any]) -> Matcher:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(parameters), overrides=LLGUIDANCE_OPTIONS)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise Refused(matcher.get_error())

        def matches(text: str) -> bool:
            matcher.reset()
            tokens = list(text.encode())
            consumed = matcher.try_consume_tokens(tokens)
            if matcher.is_error():
                raise RuntimeError(matcher.get_error())
            return consumed == len(tokens) and matcher.is_accepting()

        return matches

    return compiler


def xgrammar() -> Compiler:
    """xgrammar with the separators of `json.dumps`; not in its strict mode, which closes objects that are open."""
    from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

    compilers = GrammarCompiler(TokenizerInfo([*_BYTES, b"<stop>"], stop_token_ids=[_STOP]), max_threads=1)

    def compiler(parameters: dict[str, Any]) -> Matcher:
        compiled = compilers.compile_json_schema(
            json.dumps(parameters), any_whitespace=False, separators=(", ", ": "), strict_mode=False
        )

        def matches(text: str) -> bool:
            matcher = GrammarMatcher(compiled)
            return all(map(matcher.accept_token, text.encode())) and matcher.accept_token(_STOP)

        return matches

    return compiler


def outlines() -> Compiler:
    """outlines: a regular expression of the schema, and its index over the tokens."""
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    vocabulary = Vocabulary(_STOP, {token: [code] for code, token in enumerate(_BYTES)})

    def compiler(parameters: dict[str, Any]) -> Matcher:
        index = Index(build_regex_from_schema(json.dumps(parameters)), vocabulary)

        def matches(text: str) -> bool:
            state: int | None = index.get_initial_state()
            for byte in text.encode():
                state = index.get_next_state(state, byte)
                if state is None:
                    return False
            return index.is_final_state(state)

        return matches

    return compiler


def lm_format_enforcer() -> Compiler:
    """lm-format-enforcer, one character after another: what it allows next, and whether the text may end."""
    from lmformatenforcer import JsonSchemaParser
    from lmformatenforcer.characterlevelparser import CharacterLevelParserConfig
    from lmformatenforcer.consts import COMPLETE_ALPHABET

    # Its alphabet is what the vocabulary can write: here every character that any probe writes.
    written = (text for probe in PROBES for text in (*probe.accepted_texts, *probe.rejected_texts))
    config = CharacterLevelParserConfig(alphabet="".join(dict.fromkeys(COMPLETE_ALPHABET + "".join(written))))

    def compiler(parameters: dict[str, Any]) -> Matcher:
        def matches(text: str) -> bool:
            parser = JsonSchemaParser(parameters, config)
            for character in text:
                if character not in parser.get_allowed_characters():
                    return False
                parser = parser.add_character(character)
            return parser.can_end()

        return matches

    return compiler


@dataclass(frozen=True)
class Engine:
    """A column of the table: what loads it, and the distribution that must be installed."""

    load: Callable[[], Compiler]
    distribution: str | None = None

    @property
    def version(self) -> str | None:
        """The installed version; None where there is none."""
        if self.distribution is None:
            return "this repository"
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


THIS = "this"
ENGINES = {
    THIS: Engine(this_repository),
    "xgrammar": Engine(xgrammar, "xgrammar"),
    "llguidance": Engine(llguidance, "llguidance"),
    "outlines": Engine(outlines, "outlines_core"),
    "lm-format-enforcer": Engine(lm_format_enforcer, "lm-format-enforcer"),
}


# ---------------------------------------------------------------------------------------------------------------------
# One probe, one engine
# ---------------------------------------------------------------------------------------------------------------------


_ACCIDENTS = (
    MemoryError,
    RecursionError,
    UnicodeError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    TypeError,
    ArithmeticError,
)


def judge(compiler: Compiler, probe: Probe) -> Outcome:
    """Put a probe to an engine.

    Args:
        compiler: the engine.
        probe: what it is asked.

    Returns:
        Its outcome. An exception counts as a refusal unless it is of a kind that only an accident raises.
    """
    try:
        matches = compiler(probe.parameters)
        false_rejects = tuple(text for text in probe.accepted_texts if not matches(text))
        false_accepts = tuple(text for text in probe.rejected_texts if matches(text))
    except _ACCIDENTS as error:
        return Outcome("error", _message(error))
    except Exception as error:
        return Outcome("refuses", _message(error))
    except BaseException as error:  # the panic of a Rust engine
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return Outcome("error", _message(error))
    result = "ignores" if false_accepts else "incomplete" if false_rejects else "yes"
    return Outcome(result, "", _shortened(false_accepts), _shortened(false_rejects))


def _message(error: BaseException) -> str:
    text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
    return text.strip().replace(str(ROOT), "")[:300]


def _shortened(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(text if len(text) <= 120 else text[:117] + "..." for text in texts)


class Lost(Exception):
    """A worker took too long, or died."""


class Worker:
    """A function in a process of its own with bounded time and memory, begun anew after it was lost.

    Args:
        load: gives the function; it and its answers must be picklable.
        seconds: time limit of one answer.
    """

    def __init__(self, load: Callable[[], Callable[[Any], Any]], seconds: float = SECONDS) -> None:
        self.load = load
        self.seconds = seconds
        self.process: Any = None
        self.connection: Connection | None = None

    def ask(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            Lost: there was none within the limit, or the process died of it.
        """
        connection = self.connection or self._start()
        try:
            connection.send(request)
            if connection.poll(self.seconds):
                return connection.recv()
            reason = f"no result within {self.seconds:g} seconds"
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the process died with code {self.process.exitcode}"
        self.close()
        raise Lost(reason)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # engines start threads, which a fork would not copy
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.load, theirs), daemon=True)
        self.process.start()
        theirs.close()
        try:
            if not self.connection.poll(START_SECONDS):
                raise TimeoutError(f"{self.load} did not start within {START_SECONDS:g} seconds.")
            self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.load} did not start: its error is above.") from None
        return self.connection

    def close(self) -> None:
        """End the process."""
        if self.connection is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.connection = None


def _serve(load: Callable[[], Callable[[Any], Any]], connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer = load()
    # Engines log what they ignore; the table says it.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(answer(request))


def engine_judge(load: Callable[[], Compiler]) -> Callable[[Probe], Outcome]:
    """`judge` of one engine, loaded once."""
    return partial(judge, load())


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def run(names: Sequence[str], probes: Sequence[Probe] = PROBES) -> dict[str, Any]:
    """Put probes to engines.

    Args:
        names: of `ENGINES`; those that are not installed are left out.
        probes: what to ask.

    Returns:
        JSON: versions of the engines, and the outcome of every probe and engine.
    """
    versions = {name: ENGINES[name].version for name in names}
    results: dict[str, dict[str, Any]] = {probe.name: {} for probe in probes}
    for name in (name for name, version in versions.items() if version):
        worker = Worker(partial(engine_judge, ENGINES[name].load))
        for probe in tqdm(probes, desc=name, unit="probe"):
            try:
                outcome = worker.ask(probe)
            except Lost as error:
                outcome = Outcome("error", str(error))
            results[probe.name][name] = {key: value for key, value in asdict(outcome).items() if value}
        worker.close()
    return {"python": platform.python_version(), "engines": versions, "probes": results}


_INTRODUCTION = """\
# Which JSON Schema keywords are guaranteed, by engine

Made by `python -m eval.schema_coverage`; do not edit. The engines are installed with `pip install -e ".[rivals]"`;
those that are not installed are left out.

{count} schemas (`eval/schema_probes.py`), each with texts that fit and texts that do not, written as `json.dumps` does:
keys in the order of the schema, separators `, ` and `: `; engines that have an option for that are given it. Every text
goes byte by byte (lm-format-enforcer: character by character) through the engine's own matcher."""


def markdown(report: dict[str, Any]) -> str:
    """The coverage table of a report of `run`."""
    names = [name for name, version in report["engines"].items() if version]
    outcomes = report["probes"]
    lines = [
        *_INTRODUCTION.format(count=len(outcomes)).splitlines(),
        "",
        "| result | meaning |",
        "|---|---|",
        *(f"| {result} | {meaning} |" for result, meaning in RESULTS.items()),
        "",
        "| engine | version | " + " | ".join(RESULTS) + " |",
        "|---|---|" + "---|" * len(RESULTS),
    ]
    for name in names:
        counts = Counter(outcome[name]["result"] for outcome in outcomes.values())
        cells = " | ".join(str(counts[result]) for result in RESULTS)
        lines.append(f"| {name} | {report['engines'][name]} | {cells} |")
    for section, probes in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            "| keyword | | " + " | ".join(names) + " |",
            "|---|---|" + "---|" * len(names),
        ]
        for probe in (probe for probe in probes if probe.name in outcomes):
            cells = " | ".join(_cell(outcomes[probe.name][name]["result"]) for name in names)
            lines.append(f"| `{probe.keyword}` | {probe.variant} | {cells} |")
    left = {
        name: outcome[THIS]
        for name, outcome in outcomes.items()
        if outcome.get(THIS, {"result": "yes"})["result"] != "yes"
    }
    if left:
        lines += ["", "## What this repository leaves out", "", "| keyword | result | |", "|---|---|---|"]
        lines += [f"| {name} | {outcome['result']} | {_why(name, outcome)} |" for name, outcome in left.items()]
    return "\n".join(lines) + "\n"


def _cell(result: str) -> str:
    return f"**{result}**" if result in ("ignores", "error") else result


BY_DESIGN = {
    "properties: in another order than the schema's": "arguments are written in the order of the schema",
    "type: null where it may be left out": "an optional argument without a value is left out and never null",
}
"""Probes some of whose texts our grammar does not write, and why not."""


def _why(name: str, outcome: dict[str, Any]) -> str:
    texts = [*outcome.get("false_accepts", ()), *outcome.get("false_rejects", ())]
    rejected = ", ".join(f"`{text}`" for text in texts)
    detail = outcome.get("detail") or f"{BY_DESIGN.get(name, '')} {rejected}".strip()
    return detail.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--out", type=Path, default=ROOT / "eval" / "results" / "schema_coverage.json")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "schema_coverage.md")
    options = parser.parse_args(arguments)
    report = run(options.engines)
    for name, version in report["engines"].items():
        if version is None:
            print(f"{name} is missing: pip install {ENGINES[name].distribution}")
            continue
        print(f"{name:18} {version:16}", dict(Counter(o[name]["result"] for o in report["probes"].values())))
    for path, text in (
        (options.out, json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        (options.doc, markdown(report)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
