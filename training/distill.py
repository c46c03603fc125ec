"""Targets of the head out of the base itself: the call that the base writes for a prompt, and how sure it is of each
token.

What the head drafts is kept where the base would have written the same, right or wrong, so the base's own constrained
call is a better target than the gold one. Takes rows of one call; gives records in the normalised format whose call is
the base's, with its distributions beside it. Knows the grammar of calls; trains nothing itself.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from repo_package import load_repo_module

from .base import draw_style
from .data import DEFAULT_DATA, Record, Row, RowStream, SingleCall, read_records, single_call, write_records
from .features import base_digest
from .head import (
    MAX_SCAFFOLD,
    HeadExample,
    ObjectiveRun,
    call_stream,
    canvas_example,
    draw_canvas,
    first_example,
    fit_head,
)
from .stage_model import left_padded, loading_arguments, on_device, rates
from .trainer import Throughput, world_size

modeling = load_repo_module("modeling_smollm_diffusion")
generation = load_repo_module("generation_smollm_diffusion")
grammars = load_repo_module("reply_grammar")
layouts = load_repo_module("scaffold_layout")
scaffolds = load_repo_module("schema_scaffold")
slots = load_repo_module("slot_grammar")
algebra = load_repo_module("schema_algebra")

logger = logging.getLogger(__name__)

SOFT_TOKENS = 8
"""Tokens of a distribution that are kept; the rest is spread over them."""

ENDS = -1
"""Stands for NULL in a record, whose id depends on the model: the value ends here."""

_WHOLE = 10_000  # shares are stored in so many parts of one
_ARRAY_BUDGET = 4  # of the layout that says whether the head can draft a call at all
_BEFORE_ARGUMENTS = b'", "arguments": '

PARTS = "parts"
MARK = "run.json"
PART_ROWS = 256
"""Rows of one part file: what an interrupted run loses at most."""

Soft = dict[str, list[list[list[int]]]]
"""JSON pointer of a value -> for each of its tokens and for its end: ids and their shares, the likeliest first."""


# ---------------------------------------------------------------------------------------------------------------------
# What the base writes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A row whose call the head can draft.

    Args:
        row: the row.
        tool: the called tool as the prompt shows it.
        scaffold, layout: of the tool.
    """

    row: Row
    tool: Record
    scaffold: Any
    layout: Any


class BaseTeacher:
    """Writes calls with the base alone, the called tool forced, and says how sure the base is of them.

    Args:
        model: the model; its head is not used.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = slots.Vocabulary(tokenizer, model.config.get_text_config().vocab_size, model.device)

    @torch.no_grad()
    def targets(self, rows: Sequence[Row]) -> list[Record | str]:
        """The base's own calls for prompts, in one batch.

        Args:
            rows: prompts with one gold call each.

        Returns:
            For each row a record with tools and messages as its prompt shows them, the base's call, the gold call as
            `gold` and the distributions as `soft`; or the reason why there is none.
        """
        tasks = [self._task(row) for row in rows]
        found: list[Record | str] = [task if isinstance(task, str) else "" for task in tasks]
        asked = [(index, task) for index, task in enumerate(tasks) if isinstance(task, _Task)]
        written = []
        for (index, task), call in zip(asked, self._write([task for _, task in asked]), strict=True):
            if isinstance(call, str):
                found[index] = call
            else:
                written.append((index, task, *call))
        logits = self._logits([(task.row.prompt_ids, reply) for _, task, reply, _ in written])
        for (index, task, reply, arguments), scores in zip(written, logits, strict=True):
            soft = self._soft(task, reply, arguments, scores)
            found[index] = _record(task.row, {"name": task.scaffold.tool, "arguments": arguments}, soft)
        return found

    def _task(self, row: Row) -> _Task | str:
        call = single_call(row)
        if call is None:
            return "no call with arguments"
        if shown_prompt(self.tokenizer, row.messages, row.tools) != row.prompt_ids:
            return "prompt differs"
        tool = next(tool for tool in row.tools if tool["function"]["name"] == call.name)
        try:
            scaffold = scaffolds.compile_scaffold(tool)
        except scaffolds.UnsupportedSchemaError:
            return "unsupported schema"
        layout = layouts.draft_layout(scaffold, _ARRAY_BUDGET)
        return "unsupported schema" if layout is None else _Task(row, tool, scaffold, layout)

    def _write(self, tasks: Sequence[_Task]) -> list[tuple[list[int], Record] | str]:
        """Reply tokens and arguments of each task's call, or why it is no target."""
        if not tasks:
            return []
        prompts = [task.row.prompt_ids for task in tasks]
        ids, mask = left_padded(prompts, self.tokenizer.pad_token_id, self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            # With one tool a row that must be called, a batch can force a different tool in each.
            tools=[[task.tool] for task in tasks],
            tool_choice="required",
            tokenizer=self.tokenizer,
            decoding="ar",
            do_sample=False,
            max_tool_calls=1,
            return_dict_in_generate=True,
        )
        found: list[tuple[list[int], Record] | str] = []
        for task, sequence, stats in zip(
            tasks, output.sequences[:, ids.shape[1] :].tolist(), output.stats, strict=True
        ):
            reply = sequence[: sequence.index(self.vocabulary.im_end) + 1]
            (call,) = generation.parse_calls(self.vocabulary, reply)
            found.append("cut at a limit" if stats.cut else self._checked(task, reply, call["arguments"]))
        return found

    def _checked(self, task: _Task, reply: list[int], arguments: Record) -> tuple[list[int], Record] | str:
        """A call that a draft can equal token by token."""
        try:
            task.layout.texts(arguments)
            tokens = grammars.call_continuation(self.vocabulary, task.scaffold, arguments, b"")
        except ValueError:
            return "beyond what is drafted"
        if reply != [self.vocabulary.call_start, *tokens, self.vocabulary.im_end]:
            return "spelled otherwise"
        return reply, arguments

    # --------------------------------------------------------------- how sure it is

    def _logits(self, calls: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """[reply, vocab] of each (prompt, reply): the logits in front of each reply token, in one forward."""
        if not calls:
            return []
        rows = [[*prompt, *reply] for prompt, reply in calls]
        ids, mask = left_padded(rows, self.tokenizer.pad_token_id, self.model.device)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=max(len(reply) for _, reply in calls) + 1,
        ).logits
        return [row[-len(reply) - 1 : -1] for row, (_, reply) in zip(logits, calls, strict=True)]

    def _soft(self, task: _Task, reply: list[int], arguments: Record, logits: Tensor) -> Soft:
        """The base's distributions at every value that the canvas holds token by token as the call does."""
        config = self.model.config
        limits = 1, config.max_value_tokens, config.max_call_tokens
        grammar = grammars.ReplyGrammar(self.vocabulary, [task.scaffold], *limits)
        start, opening = grammar.start(), len(grammar.opening())
        cursors = [start] * opening + [start, *start.walk(reply[opening:])]  # in front of each token of the reply
        spans, token_at = value_spans(arguments), self._token_at(reply)
        found: Soft = {}
        for slot, text in zip(task.layout.slots, task.layout.texts(arguments), strict=True):
            span = spans.get(slot.path) if text is not None and slot.role == "value" else None
            quote = int(slot.leaf.quoted)
            if span is None or span.text[quote : len(span.text) - quote] != text:
                continue  # escaped, or without a place of its own
            first, last = token_at[span.start + quote], token_at[span.end - quote]
            rows = [
                self._shares(cursors[place], slot.leaf, reply[first:place], logits[place])
                for place in range(first, last + 1)
            ]
            if self._agrees(rows, reply[first:last]):
                found[slot.path] = rows
        return found

    @staticmethod
    def _agrees(rows: Sequence[list[list[int]]], tokens: Sequence[int]) -> bool:
        """Whether what is likeliest is the value. Several tokens that can close a value may together outweigh the one
        that the base goes on with, and forwards of different shapes round differently."""
        return [ids[:1] for ids, _ in rows] == [[token] for token in [*tokens, ENDS]]

    def _token_at(self, reply: Sequence[int]) -> dict[int, int]:
        """Place in the reply of the token that begins at each byte of the arguments."""
        lengths = [len(self.vocabulary.spell([token])) for token in reply]
        text = self.vocabulary.spell(reply)
        begin = text.index(_BEFORE_ARGUMENTS) + len(_BEFORE_ARGUMENTS)
        ends = accumulate(lengths)
        return {end - size - begin: place for place, (end, size) in enumerate(zip(ends, lengths, strict=True))}

    def _shares(self, cursor: Any, leaf: Any, prefix: Sequence[int], logits: Tensor) -> list[list[int]]:
        """Ids and shares of the likeliest tokens behind the beginning of a value, `ENDS` among them."""
        allowed = cursor.mask()
        shares = logits.float().masked_fill(~allowed, float("-inf")).softmax(-1)
        content, inside, may_end = self._content(leaf, prefix)
        ends = float(shares[allowed & ~inside].sum()) if may_end else 0.0
        values, ids = (shares * (allowed & content)).topk(min(SOFT_TOKENS, len(shares)))
        kept = sorted([(ends, ENDS), *zip(values.tolist(), ids.tolist(), strict=True)], key=lambda entry: -entry[0])
        kept = kept[:SOFT_TOKENS]
        total = sum(share for share, _ in kept) or 1.0
        parts = [(token, round(_WHOLE * share / total)) for share, token in kept]
        return [[token for token, part in parts if part], [part for _, part in parts if part]]

    def _content(self, leaf: Any, prefix: Sequence[int]) -> tuple[Tensor, Tensor, bool]:
        """What may follow the beginning of a value.

        Returns:
            bool [vocab], tokens that go on with it as the canvas spells it; bool [vocab], tokens that any value of its
            kind may go on with; whether it may end here.
        """
        if leaf.kind == "choice":
            choices = [self.vocabulary.encode(choice) for choice in leaf.choices]
            behind = [choice[len(prefix) :] for choice in choices if choice[: len(prefix)] == tuple(prefix)]
            content = torch.zeros(self.vocabulary.size, dtype=torch.bool, device=self.vocabulary.device)
            content[[rest[0] for rest in behind if rest]] = True
            return content, content, () in behind
        automaton, state, chars = self.vocabulary.lift(leaf.automaton), 0, 0
        for token in prefix:
            state, begun = automaton.step(state, token)
            chars += begun
        room = self.model.config.max_value_tokens - len(prefix)
        content = automaton.allowed(state, room, None if leaf.max_length is None else leaf.max_length - chars)
        if leaf.kind == "string":
            return content & self._unescaped, ~self._closing_quotes, automaton.accepts(state)
        return content, self._numeric, automaton.accepts(state)

    def _tokens(self, holds: Callable[[bytes], bool]) -> Tensor:
        """bool [vocab]: the tokens whose bytes are such."""
        found = [spelled is not None and holds(spelled) for spelled in self.vocabulary.bytes]
        return torch.tensor(found, device=self.vocabulary.device)

    @cached_property
    def _unescaped(self) -> Tensor:
        return self._tokens(lambda spelled: not set(spelled) & set(b'"\\'))

    @cached_property
    def _closing_quotes(self) -> Tensor:
        return self._tokens(lambda spelled: spelled.startswith(b'"'))

    @cached_property
    def _numeric(self) -> Tensor:
        return self._tokens(lambda spelled: set(spelled) <= set(b"-+.0123456789eE"))


def shown_prompt(tokenizer: PreTrainedTokenizerFast, messages: list[Record], tools: list[Record]) -> list[int]:
    """Tokens of the prompt that shows exactly these tools in this order."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return ids


@dataclass(frozen=True)
class Span:
    """Where a value stands in the JSON text of its arguments: bytes `start` to `end`, which read `text`."""

    start: int
    end: int
    text: str


def value_spans(arguments: Record) -> dict[str, Span]:
    """Where every value stands in the JSON text of arguments, by its JSON pointer.

    Args:
        arguments: in the order in which they are written.

    Returns:
        Spans of the values in `json.dumps(arguments, ensure_ascii=False)`, of containers too.
    """
    found: dict[str, Span] = {}

    def walk(value: Any, pointer: str, start: int) -> int:
        text = json.dumps(value, ensure_ascii=False)
        place = start + 1
        if isinstance(value, dict):
            for name, inner in value.items():
                place += len(f"{json.dumps(name, ensure_ascii=False)}: ".encode())
                place = walk(inner, f"{pointer}/{algebra.escape_pointer(name)}", place) + len(", ")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                place = walk(inner, f"{pointer}/{index}", place) + len(", ")
        found[pointer] = Span(start, start + len(text.encode()), text)
        return found[pointer].end

    walk(arguments, "", 0)
    return found


def _record(row: Row, call: Record, soft: Soft) -> Record:
    return {
        "id": row.id,
        "source": f"{row.source}+base",
        "license": "that of the source",
        "messages": row.messages,
        "tools": row.tools,
        "calls": [call],
        "gold": row.calls,
        "soft": soft,
    }


# ---------------------------------------------------------------------------------------------------------------------
# On the canvas
# ---------------------------------------------------------------------------------------------------------------------


def soft_targets(
    scaffold_ids: Tensor, field_ids: Tensor, layout: Any, soft: Mapping[str, Any], null_id: int
) -> tuple[Tensor, Tensor]:
    """Lay the base's distributions out as the canvas of the head.

    Args:
        scaffold_ids: long [positions], the clean canvas of the base's call.
        field_ids: long [positions], the slot of each position, -1 for fixed text.
        layout: the layout that the canvas was built from.
        soft: as a record holds it.
        null_id: id of NULL.

    Returns:
        soft_ids long [positions, k] and soft_probs float32 [positions, k]. Rows of values sum to 1, NULL behind their
        ends included; all zero where nothing is known: fixed text, decisions about structure, values that the canvas
        holds otherwise than the call (escapes), parts that are not alive.
    """
    ids = torch.zeros(len(scaffold_ids), SOFT_TOKENS, dtype=torch.long)
    probs = torch.zeros(len(scaffold_ids), SOFT_TOKENS)
    for index, slot in enumerate(layout.slots):
        rows = soft.get(slot.path) if slot.role == "value" else None
        places = (field_ids == index).nonzero()[:, 0].tolist()
        if rows is None:
            continue
        rows = [*rows, *[[[ENDS], [1]]] * (len(places) - len(rows))]
        best = [row[0][0] if row[0][0] != ENDS else null_id for row in rows[: len(places)]]
        if best != scaffold_ids[places].tolist():
            continue  # another branch of a union stands at the same place
        for place, (tokens, shares) in zip(places, rows, strict=False):
            held = torch.tensor([null_id if token == ENDS else token for token in tokens])
            ids[place, : len(held)] = held
            probs[place, : len(held)] = torch.tensor(shares, dtype=torch.float32) / sum(shares)
    return ids, probs


# ---------------------------------------------------------------------------------------------------------------------
# A data set of targets
# ---------------------------------------------------------------------------------------------------------------------

TARGETS_FILE = "train/base_calls.jsonl.gz"

RowDraw = Callable[[random.Random], Row]
"""Makes one row; a pure function of its source of randomness."""


def write_targets(
    teacher: BaseTeacher,
    draw: RowDraw,
    output: Path,
    count: int,
    rows_per_batch: int,
    origin: Mapping[str, Any] | None = None,
) -> Counter[str]:
    """Write the base's calls for drawn rows as a data folder; a part-written run goes on where it was.

    Rows are drawn by their numbers alone, so that runs with different seeds learn from the same ones.

    Args:
        teacher: writes the calls.
        draw: makes the rows.
        output: folder of the result, which is in `train/base_calls.jsonl.gz`.
        count: rows that are drawn; those without a target are left out.
        rows_per_batch: rows of one forward of the base.
        origin: what decides the rows beside their number; a folder that is filled from elsewhere is refused.

    Returns:
        Counts: "kept", "as gold" (of those), and the reasons of what was left out.

    Raises:
        ValueError: the folder holds calls of another base or for other rows, or calls of which nothing says whose they
            are, or no row has a target.
    """
    if (output / TARGETS_FILE).exists() and not (output / PARTS / MARK).exists():
        raise ValueError(
            f"{output} has no {PARTS}/ beside {TARGETS_FILE}, so nothing says which base wrote these calls, and for "
            "which rows: copy it from where they were written, or use another folder."
        )
    claim(output / PARTS, {"count": count, "base": base_digest(teacher.model.base), **(origin or {})})
    paths = [output / PARTS / f"{start:08}.jsonl.gz" for start in range(0, count, PART_ROWS)]
    if not (output / TARGETS_FILE).exists():
        throughput = Throughput()
        with tqdm(total=count, desc="calls of the base", unit="row") as progress:
            for number, path in enumerate(paths):
                rows = range(number * PART_ROWS, min((number + 1) * PART_ROWS, count))
                if not path.exists():
                    found = _part(teacher, draw, rows, rows_per_batch, throughput)
                    _tally_of(path).write_text(json.dumps(_tally(found)), encoding="utf-8")
                    write_records(path, (target for target in found if not isinstance(target, str)))
                progress.update(len(rows))
        write_records(output / TARGETS_FILE, (record for path in paths for record in read_records(path)))
    counts = Counter[str]()
    for path in paths:
        counts.update(json.loads(_tally_of(path).read_text(encoding="utf-8")))
    logger.info("calls of the base in %s: %s", output / TARGETS_FILE, dict(counts))
    if not counts["kept"]:
        raise ValueError(f"None of {count} rows has a call of the base to learn from: {dict(counts)}.")
    return counts


def claim(folder: Path, options: Mapping[str, Any]) -> None:
    """Mark a folder as that of a run with these options.

    Args:
        folder: need not exist.
        options: what decides the results that are kept there, as JSON holds it.

    Raises:
        ValueError: it is of a run with other options, or holds something that is of no known run.
    """
    mark = folder / MARK
    if mark.exists():
        known = json.loads(mark.read_text(encoding="utf-8"))
        differing = sorted(name for name in {*known, *options} if known.get(name) != options.get(name))
        if differing:
            shown = ", ".join(f"{name} {known.get(name)!r}, not {options.get(name)!r}" for name in differing)
            raise ValueError(f"{folder} is of a run with {shown}: use another folder, or remove this one.")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} does not say what it is of: use another folder, or remove this one.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(dict(options)), encoding="utf-8")


def _part(
    teacher: BaseTeacher, draw: RowDraw, numbers: Sequence[int], rows_per_batch: int, throughput: Throughput
) -> list[Record | str]:
    """Targets of rows by their numbers, prompts of similar length side by side."""
    rows = [draw(random.Random(f"targets/{number}")) for number in numbers]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt_ids))
    found: list[Record | str] = [""] * len(rows)
    for begin in range(0, len(order), rows_per_batch):
        group = order[begin : begin + rows_per_batch]
        for index, target in zip(group, teacher.targets([rows[index] for index in group]), strict=True):
            # A record may be drawn more than once, with other tools beside the called one.
            found[index] = target if isinstance(target, str) else {**target, "id": f"{target['id']}#{numbers[index]}"}
        throughput.count(rows=len(group), tokens=sum(len(rows[index].prompt_ids) for index in group))
    logger.info("calls of the base: %s", rates(throughput))
    return found


def _tally_of(part: Path) -> Path:
    return part.with_name(part.name.replace(".jsonl.gz", ".json"))


def _tally(found: Sequence[Record | str]) -> dict[str, int]:
    counts = Counter(target if isinstance(target, str) else "kept" for target in found)
    counts["as gold"] = sum(not isinstance(target, str) and target["calls"] == target["gold"] for target in found)
    return dict(counts)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillRun(ObjectiveRun):
    """Options of one run; each is an argument of `train_hf.py --stage distill`.

    Args:
        model: folder or repo of the model whose head is trained further, on the calls of its own base.
        targets: folder of the base's calls; None = `targets` in `output`. It is filled first, and taken as it is where
            it is full of calls of the same base for the same rows, as its `parts/` says.
        target_rows: prompts that the base writes a call for.
        target_batch: prompts of one forward of the base.
        distill_weight: part of the cross-entropy that is taken with the base's distribution where it is known; the
            rest is taken with the token that it chose.
    """

    model: str = ""
    targets: Path | None = None
    target_rows: int = 20_000
    target_batch: int = 8
    distill_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_rows", "target_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight must be from 0 to 1, got {self.distill_weight}.")
        if world_size() > 1 and not (self.folder / TARGETS_FILE).exists():
            raise ValueError(
                f"{self.folder / TARGETS_FILE} is missing, which one process writes: start this command without "
                "torchrun until training begins."
            )

    @property
    def folder(self) -> Path:
        """Where the base's calls are."""
        return self.targets or self.output / "targets"


def distill(run: DistillRun, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Train the head of a model further on what its base writes, and save it as `train_head` does.

    Args:
        run: the options.
        tokenizer: tokenizer of the model.

    Returns:
        The trained model.

    Raises:
        ValueError: the run names no model, or its folder of targets was filled with other options.
    """
    if not run.model:
        raise ValueError("Distillation goes on from a model with a trained head: pass --model with its folder or repo.")
    model = modeling.SmolLMDiffusionForCausalLM.from_pretrained(
        run.model, **loading_arguments(run.quantization, run.bf16)
    )
    return fit_to_base(model, run, tokenizer)


def fit_to_base(model: Any, run: DistillRun, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Let the base write its calls and train the head on them, as `fit_head` does on gold ones.

    Args:
        model: in float32, its base may be quantised.
        run: the options.
        tokenizer: tokenizer of the model.

    Returns:
        The trained model.
    """
    teacher = BaseTeacher(on_device(model).eval(), tokenizer)
    rows = _Rows(run, tokenizer)
    write_targets(teacher, rows, run.folder, run.target_rows, run.target_batch, rows.origin())
    model.config.distill_weight = run.distill_weight
    return fit_head(model, run, tokenizer, TargetExamples(run, teacher.vocabulary, model.config, tokenizer))


class _Rows:
    """Draws rows in the styles that the head is trained in; reads the data when the first one is drawn."""

    def __init__(self, run: DistillRun, tokenizer: PreTrainedTokenizerFast) -> None:
        self.run, self.tokenizer = run, tokenizer

    def __call__(self, rng: random.Random) -> Row:
        return self._stream.draw(draw_style(rng, rng.random()), rng)

    def origin(self) -> dict[str, Any]:
        """What decides the rows, wherever the data are: digests of files' names and sizes and of what is left out."""
        run = self.run
        files = [path for folder in run.data or [DEFAULT_DATA] for path in sorted((folder / "train").glob("*"))]
        left_out = b"" if run.leave_out is None else run.leave_out.read_bytes()
        data = json.dumps([[path.name, path.stat().st_size] for path in files]).encode()
        found = {
            name: hashlib.sha256(part).hexdigest()[:16] for name, part in (("data", data), ("leave_out", left_out))
        }
        return found | {"on_error": run.on_error}

    @cached_property
    def _stream(self) -> RowStream:
        return call_stream(self.run, self.tokenizer)


class TargetExamples:
    """Examples of the base's calls.

    Args:
        run: the options; `write_targets` has filled its folder.
        vocabulary: of the tokenizer.
        config: the model's config: ids of MASK and NULL, weights of the objective.
        tokenizer: of the model.
    """

    def __init__(self, run: DistillRun, vocabulary: Any, config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        self.run, self.vocabulary, self.config, self.tokenizer = run, vocabulary, config, tokenizer
        # They stay text until they are drawn: parsed, they need many times the memory.
        self.lines = [json.dumps(record).encode() for record in read_records(run.folder / TARGETS_FILE)]

    def __call__(self, rng: random.Random, progress: float) -> HeadExample:
        """Draw an example with the prompt exactly as the base saw it."""
        return first_example(lambda: (None, self._example(json.loads(rng.choice(self.lines)), rng)))[1]

    def _example(self, record: Record, rng: random.Random) -> HeadExample | None:
        """The example of a record, or None where the call does not fit the drawn budgets or the canvas is too long."""
        prompt_ids = shown_prompt(self.tokenizer, record["messages"], record["tools"])
        (call,) = record["calls"]
        (tool,) = (tool for tool in record["tools"] if tool["function"]["name"] == call["name"])
        single = SingleCall(prompt_ids, tool["function"]["parameters"], call["name"], call["arguments"])
        drawn = draw_canvas(single, self.vocabulary, self.config, rng, self.run.budgets == "fixed")
        if drawn is None or len(drawn[0].token_ids) > MAX_SCAFFOLD:
            return None
        example = canvas_example(prompt_ids, *drawn, self.config, rng, self.run.tail_share)
        if self.config.distill_weight == 0:
            return example
        null_id, layout = self.config.null_token_id, drawn[0].layout
        ids, probs = soft_targets(example.scaffold_ids, example.field_ids, layout, record["soft"], null_id)
        return replace(example, soft_ids=ids, soft_probs=probs)
