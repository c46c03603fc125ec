"""Whether talking is untouched by the head: `python -m eval.chat`.

The model is compared with its plain base: the base alone, written to a folder and loaded by transformers without any
code of this repository (or the checkpoint that `--base` names). Both get the same prompts of chat and of maths with
thinking, made here or taken from DATA/text, with and without tools in the prompt, once as the model is and, the first
few of each group, once more with a draft adapter that is present but off. Compared are weights, logits of one forward
over prompt and reply, logits of every generated step, and greedy tokens; logits by their bits. Where the prompt shows
tools, a reply is compared if neither of the two calls, and its tokens only: the cache is then filled together with the
opening of a call, which may round otherwise. So two replies may part where the plain base finds two tokens equally
likely; such ties are counted, and what is behind them is not compared.

Ends with status 1 where anything differs.
"""

import argparse
import hashlib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from eval.devices import check_device, device_name, wait_for
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import load_repo_module
from training.records import Record, read_records

tokenization = load_repo_module("tokenization_utils")

STATES = ("as loaded", "adapter off")
"""The model itself, and the model with a draft adapter, which acts in no forward but those of drafts."""
PROMPTS = 25
"""Prompts of a group, unless `--limit` says otherwise."""
ADAPTER_PROMPTS = 10
"""Prompts of a group that the state with an adapter gets at most: one that acted would change every one of them."""
MAX_CHARACTERS = 2000
"""Longer conversations of DATA/text are left out."""
MAX_MESSAGES = 6
"""Messages of a conversation of DATA/text that are looked at; the prompt ends with the user's last among them."""
NEAR_TIE = 1e-4
"""Logits of the plain base that are no further apart are equal up to rounding; in float32 it is about 1e-5."""

# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def _tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """A tool whose arguments, all texts, have these descriptions; the first must be given."""
    properties = {argument: {"type": "string", "description": text} for argument, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool("get_weather", "Weather of a place", city="Name of the city", date="Day as said by the user"),
    _tool("play_music", "Play music in a room", artist="Artist to play", room="Where to play"),
    _tool("set_alarm", "Set an alarm", time="Time of the alarm", day="Day of the alarm"),
]
"""What prompts show that show tools; none of the requests made here needs them."""

_CHAT = (
    "hello",
    "are you a robot",
    "Tell me something about {topic}.",
    "What do you think of {topic}?",
    "Write two sentences on {topic}.",
    "Explain {topic} to a child.",
    "Which do you like better, {topic} or {other}?",
    "I had a long day with {topic}. Cheer me up!",
)
_TOPICS = ("the sea", "trains", "fresh bread", "Zürich 🙂", "the number zero", "old maps", "winter", "C++ & <html>")
_MATHS = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "A box holds {a} {things}. How many {things} are in {b} boxes?",
    "{name} had {sum} {things} and gave {a} away. How many are left?",
    "{name} shares {product} {things} equally among {b} friends. How many does each of them get?",
    "One ticket costs ${a} and a snack ${b}. What do {c} tickets and one snack cost?",
)
_NAMES = ("Ada", "Minh", "Olu", "Sofía", "Tom")
_THINGS = ("pencils", "apples", "stamps", "coins")


@dataclass(frozen=True)
class Prompt:
    """One conversation.

    Args:
        id: unique.
        group: of the table.
        messages: ends with the user's turn.
        thinks: asked in think mode.
    """

    id: str
    group: str
    messages: list[dict[str, Any]]
    thinks: bool


def own_prompts(count: int, seed: int) -> list[Prompt]:
    """Prompts made here: chat, some with a system message or an earlier exchange, and maths in think mode.

    Args:
        count: of each of the two groups.
        seed: of the draw.
    """
    rng = random.Random(seed)
    found = []
    for number in range(count):
        topic, other = rng.sample(_TOPICS, 2)
        messages = [{"role": "user", "content": _CHAT[number % len(_CHAT)].format(topic=topic, other=other)}]
        if number % 3 == 1:
            messages.insert(0, {"role": "system", "content": f"You are fond of {other}. Answer briefly."})
        if number % 3 == 2:
            earlier = [{"role": "user", "content": "Hi there!"}, {"role": "assistant", "content": "Hello! What's up?"}]
            messages = earlier + messages
        found.append(Prompt(f"own-chat-{number}", "own chat", messages, thinks=False))
    for number in range(count):
        a, b, c = (rng.randint(2, 40) for _ in range(3))
        text = _MATHS[number % len(_MATHS)].format(
            a=a, b=b, c=c, sum=a + b, product=a * b, name=rng.choice(_NAMES), things=rng.choice(_THINGS)
        )
        found.append(Prompt(f"own-maths-{number}", "own maths", [{"role": "user", "content": text}], thinks=True))
    return found


def text_prompts(data: Path, limit: int) -> list[Prompt]:
    """Prompts of the files in DATA/text, in the order of a hash of their ids; none where there is no such folder.

    Args:
        data: folder with `text/`.
        limit: most prompts of each of the two groups, chat and what has a worked solution; 0 = all.
    """
    groups: dict[str, list[Prompt]] = {"text chat": [], "text maths": []}
    records = [record for path in sorted(data.glob("text/*.jsonl.gz")) for record in read_records(path)]
    for record in sorted(records, key=lambda record: hashlib.sha256(record["id"].encode()).hexdigest()):
        thinks = bool(record.get("think"))
        group = groups["text maths" if thinks else "text chat"]
        messages = _asked(record)
        if messages and len(group) < (limit or len(records)):
            group.append(Prompt(record["id"], "text maths" if thinks else "text chat", messages, thinks))
    return [prompt for group in groups.values() for prompt in group]


def _asked(record: Record) -> list[dict[str, Any]]:
    """The beginning of a record's conversation up to a turn of the user; nothing where there is none or it is long."""
    messages = record["messages"][:MAX_MESSAGES]
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    messages = messages[: users[-1] + 1] if users else []
    return messages if sum(len(message["content"]) for message in messages) <= MAX_CHARACTERS else []


# ---------------------------------------------------------------------------------------------------------------------
# The two models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """The model and its plain base.

    Args:
        model: the model.
        base: the plain base, a class of transformers.
        tokenizer: of both.
        new_tokens: most tokens of a thought and of a reply.
    """

    model: Any
    base: Any
    tokenizer: PreTrainedTokenizerFast
    new_tokens: int

    @property
    def greedy(self) -> dict[str, Any]:
        """What both are asked for; said in full, since their generation configs may differ."""
        return {
            "do_sample": False,
            "max_new_tokens": self.new_tokens,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def token(self, text: str) -> int:
        """The id of a token of the markup."""
        return int(self.tokenizer.convert_tokens_to_ids(text))

    def encode(self, prompt: Prompt, tools: Sequence[dict[str, Any]]) -> Tensor:
        """The prompt as ids, long [1, prompt]."""
        encoded = self.tokenizer.apply_chat_template(
            prompt.messages,
            tools=list(tools) or None,
            add_generation_prompt=True,
            enable_thinking=prompt.thinks,
            return_dict=True,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(self.model.device)

    def base_writes(self, ids: Tensor, **options: Any) -> list[int]:
        """The plain base's greedy reply."""
        options = {"attention_mask": torch.ones_like(ids), **self.greedy, **options}
        return self.base.generate(ids, **options)[0, ids.shape[1] :].tolist()

    def model_writes(self, ids: Tensor, **options: Any) -> tuple[list[int], int]:
        """The model's greedy reply to a prompt that shows tools, and how many calls it holds."""
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            max_tool_calls=1,
            **self.greedy,
            **options,
        )
        return output.sequences[0, ids.shape[1] :].tolist(), output.stats[0].calls

    def base_thinks(self, ids: Tensor) -> list[int]:
        """The plain base's greedy reply behind a thought that it is made to begin and to end."""
        line = self.tokenizer.encode("\n", add_special_tokens=False)
        end, call = self.token(tokenization.THINK_END_TOKEN), self.token(tokenization.TOOL_CALL_TOKEN)
        reply = [self.token(tokenization.THINK_TOKEN), *line]
        ends = [self.tokenizer.eos_token_id, end]
        thought = self.base_writes(_longer(ids, reply), eos_token_id=ends, suppress_tokens=[call])
        stop = next((place for place, token in enumerate(thought) if token in ends), len(thought))
        reply += [*thought[:stop], end, *line]
        return reply + self.base_writes(_longer(ids, reply))


def _longer(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    return torch.cat([ids, ids.new_tensor([list(tokens)])], dim=1)


def plain_base(model: Any, name: str | None, dtype: torch.dtype, device: str) -> Any:
    """The base as transformers alone loads it.

    Args:
        model: the model.
        name: folder or repo of the base; None writes out the model's own.
        dtype: of the weights.
        device: where it runs.
    """
    with tempfile.TemporaryDirectory(prefix="plain_base_") as folder:
        if name is None:
            model.base.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(name or folder, trust_remote_code=False, dtype=dtype)
        return base.to(device).eval()


def load_pair(options: argparse.Namespace) -> Pair:
    """The models that the options name.

    Raises:
        OSError, ValueError: there is no such device or model, or it has no schema diffusion head.
    """
    check_device(options.device)
    dtype = getattr(torch, options.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {options.model}: no model could be loaded from there ({str(error).splitlines()[0]}). Give the "
            "folder of a model (config.json, model.safetensors, tokenizer.json) or the name of a Hub repo."
        ) from error
    if not hasattr(model, "drafting_base"):
        raise ValueError(
            f"{options.model} is a {type(model).__name__}: --model takes one with a schema diffusion head."
        )
    model = model.to(options.device).eval()
    return Pair(model, plain_base(model, options.base, dtype, options.device), tokenizer, options.new_tokens)


@torch.no_grad()
def add_random_adapter(pair: Pair, seed: int) -> bool:
    """Give the model a random draft adapter, unless it has one.

    Args:
        pair: the models.
        seed: of the adapter's weights.

    Returns:
        Whether it changes the base's logits where it acts, as it must for the comparison to mean something.

    Raises:
        ImportError: peft is not installed.
    """
    if not pair.model.has_draft_adapter:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pair.model.add_draft_adapter(r=4, lora_alpha=16, init_lora_weights=False)
    ids = pair.encode(Prompt("", "", [{"role": "user", "content": "hello"}], thinks=False), [])
    with pair.model.drafting_base():
        drafting = pair.model.base(ids).logits
    return differing(drafting, pair.base(ids).logits) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many numbers of two tensors differ in their bits; all where shape or dtype differ."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return max(ours.numel(), theirs.numel())
    kind = _BITS[ours.element_size()]
    one, other = ours.detach().contiguous().view(kind), theirs.detach().to(ours.device).contiguous().view(kind)
    return 0 if torch.equal(one, other) else int((one != other).sum())


def _logits(ours: Tensor, theirs: Tensor) -> list[int]:
    """Numbers that are compared, and how many of them differ."""
    return [max(ours.numel(), theirs.numel()), differing(ours, theirs)]


def _tokens(ours: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """The same of tokens; what one reply has more than the other differs."""
    length = max(len(ours), len(theirs))
    return [length, length - sum(one == other for one, other in zip(ours, theirs, strict=False))]


def near_tie(pair: Pair, ids: Tensor, ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two replies part because the base finds both tokens as likely.

    The model reads a prompt and the opening of a thought in two forwards, the plain base in one: that rounds otherwise.

    Args:
        pair: the models.
        ids: of the prompt, long [1, prompt].
        ours, theirs: the replies.

    Returns:
        Number of tokens in front of the first difference; None where there is none, or where the plain base's logits of
        the two tokens are further apart than `NEAR_TIE`.
    """
    parted = [place for place, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other]
    if not parted:
        return None
    logits = pair.base(_longer(ids, theirs[: parted[0]])).logits[0, -1]
    apart = float(logits[ours[parted[0]]] - logits[theirs[parted[0]]])
    return parted[0] if abs(apart) <= NEAR_TIE else None


def compare_weights(pair: Pair) -> list[int]:
    """Tensors of the base's state, and how many of them are not the plain base's."""
    ours, theirs = pair.model.base.state_dict(), pair.base.state_dict()
    names = ours.keys() | theirs.keys()
    both = ours.keys() & theirs.keys()
    return [len(names), len(names - both) + sum(differing(ours[name], theirs[name]) > 0 for name in both)]


def timed(
    pair: Pair, ours: Callable[[], Any], theirs: Callable[[], Any], ours_first: bool
) -> tuple[Any, Any, list[float]]:
    """What model and base give, and the seconds that each takes; they take turns in being first."""
    found: dict[bool, Any] = {}
    seconds: dict[bool, float] = {}
    for is_ours in (ours_first, not ours_first):
        start = time.perf_counter()
        found[is_ours] = (ours if is_ours else theirs)()
        wait_for(pair.model.device)
        seconds[is_ours] = round(time.perf_counter() - start, 6)
    return found[True], found[False], [seconds[True], seconds[False]]


@torch.no_grad()
def compare(pair: Pair, prompt: Prompt, shows_tools: bool, ours_first: bool) -> dict[str, Any]:
    """One prompt through both.

    Args:
        pair: the models.
        prompt: the prompt.
        shows_tools: the prompt shows `TOOLS`.
        ours_first: the model goes first.

    Returns:
        Pairs of numbers: compared and different of `forward`, `steps` (without tools) and `tokens`, seconds of model
        and base under `seconds`; with tools `decision`, who calls under `tool_choice="auto"`, and
        `ties`, replies that part at a near tie.
    """
    ids = pair.encode(prompt, TOOLS if shows_tools else [])
    found = _compare_calling(pair, prompt, ids, ours_first) if shows_tools else _compare_plain(pair, ids, ours_first)
    whole = _longer(ids, found.pop("reply"))
    ours, theirs, seconds = timed(pair, lambda: pair.model(whole).logits, lambda: pair.base(whole).logits, ours_first)
    found["forward"], found["seconds"]["forward"] = _logits(ours, theirs), seconds
    return found


def _compare_plain(pair: Pair, ids: Tensor, ours_first: bool) -> dict[str, Any]:
    """Replies to a prompt without tools, with the logits of every step; also the base's `reply`."""
    options = {
        "attention_mask": torch.ones_like(ids),
        "output_logits": True,
        "return_dict_in_generate": True,
        **pair.greedy,
    }
    ours, theirs, seconds = timed(
        pair,
        lambda: pair.model.generate(ids, tokenizer=pair.tokenizer, **options),
        lambda: pair.base.generate(ids, **options),
        ours_first,
    )
    replies = [output.sequences[0, ids.shape[1] :].tolist() for output in (ours, theirs)]
    return {
        "reply": replies[1],
        "steps": _logits(torch.stack(ours.logits), torch.stack(theirs.logits)),
        "tokens": _tokens(*replies),
        "seconds": {"reply": seconds},
    }


def _compare_calling(pair: Pair, prompt: Prompt, ids: Tensor, ours_first: bool) -> dict[str, Any]:
    """Replies to a prompt that shows tools, calls forbidden and left to the model; also the base's `reply`."""
    call = pair.token(tokenization.TOOL_CALL_TOKEN)
    # The base is kept from calls in the same way: the token is not on offer.
    (ours, _), theirs, seconds = timed(
        pair,
        lambda: pair.model_writes(ids, tool_choice="none"),
        lambda: pair.base_writes(ids, suppress_tokens=[call]),
        ours_first,
    )
    free, calls = pair.model_writes(ids, enable_thinking=prompt.thinks)
    reference = pair.base_thinks(ids) if prompt.thinks else pair.base_writes(ids)
    decision = {
        (False, False): "both talk",
        (True, False): "model calls, base talks",
        (False, True): "base calls, model talks",
        (True, True): "both call",
    }[calls > 0, call in reference]
    compared = [(ours, theirs), *([(free, reference)] if decision == "both talk" else [])]
    ties = [near_tie(pair, ids, *replies) for replies in compared]
    tokens = [_tokens(*(reply[:tie] for reply in replies)) for replies, tie in zip(compared, ties, strict=True)]
    return {
        "reply": theirs,
        "tokens": [sum(column) for column in zip(*tokens, strict=True)],
        "ties": sum(tie is not None for tie in ties),
        "decision": decision,
        "seconds": {"reply": seconds},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------

COMPARED = ("forward", "steps", "tokens")
_COLUMNS = ("model", "prompts", "tools", "number", *(name for one in COMPARED for name in (one, "different")))


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the prompts of one line of the table.

    Args:
        results: of `compare`.

    Returns:
        `prompts`; compared and different numbers by what is compared; replies that part at near `ties`; prompts by
        `decision` where tools are shown; median milliseconds of model and base and the median of their ratio, for a
        forward and for a reply.
    """
    report: dict[str, Any] = {"prompts": len(results)}
    for name in COMPARED:
        pairs = [result[name] for result in results if name in result]
        report[name] = {"compared": sum(n for n, _ in pairs), "different": sum(n for _, n in pairs)}
    decisions = [result["decision"] for result in results if "decision" in result]
    report["ties"] = sum(result.get("ties", 0) for result in results)
    report["decisions"] = {name: decisions.count(name) for name in sorted(set(decisions))}
    for name in ("forward", "reply"):
        seconds = [result["seconds"][name] for result in results]
        report[f"{name}_ms"] = {
            "model": round(1000 * median(ours for ours, _ in seconds), 2),
            "base": round(1000 * median(theirs for _, theirs in seconds), 2),
            "ratio": round(median(ours / theirs for ours, theirs in seconds), 3),
        }
    return report


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The lines of a report as text."""
    lines = [_line(_COLUMNS)]
    for row in rows:
        counts = [row[name][kind] for name in COMPARED for kind in ("compared", "different")]
        lines.append(_line([row["model"], row["group"], row["tools"], row["prompts"], *counts]))
    lines += [
        "",
        _line(("model", "prompts", "tools", "number", "forward ms", "base", "ratio", "reply ms", "base", "ratio")),
    ]
    for row in rows:
        times = [row[f"{name}_ms"][kind] for name in ("forward", "reply") for kind in ("model", "base", "ratio")]
        lines.append(_line([row["model"], row["group"], row["tools"], row["prompts"], *times]))
    ties = sum(row["ties"] for row in rows)
    lines += ["", f"Replies that part where the plain base finds both tokens as likely: {ties}"]
    lines += ["Left to the model whether to call, where the prompt shows tools:"]
    lines += [f"  {row['model']}, {row['group']}: {row['decisions']}" for row in rows if row["decisions"]]
    return "\n".join(lines)


def _line(cells: Sequence[Any]) -> str:
    return "".join(f"{cell!s:<12}" if place < 3 else f"{cell!s:>12}" for place, cell in enumerate(cells))


def differences(report: dict[str, Any]) -> int:
    """Everything that differs in a report."""
    return sum(row[name]["different"] for row in report["rows"] for name in COMPARED) + sum(
        weights["different"] for weights in report["weights"].values()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = evaluation_parser("chat", __doc__, limit=PROMPTS)
    parser.add_argument("--base", default=None, help="folder or repo of the plain base; else the model's own")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=48, help="most tokens of a thought and of a reply")
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.new_tokens < 1:
        parser.error("--limit must be 0 or more, --new-tokens at least 1")
    return options


def states(pair: Pair, seed: int, adapter: dict[str, Any]) -> Iterator[str]:
    """The states of the model, one after the other; notes what became of the adapter."""
    if not pair.model.has_draft_adapter:
        yield STATES[0]
    try:
        adapter["changes_drafts"] = add_random_adapter(pair, seed)
    except ImportError as error:
        adapter["left_out"] = str(error)
        return
    yield STATES[1]


def first_of_each(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompts of each group."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    return [prompt for group in groups.values() for prompt in group[:count]]


def measure(pair: Pair, prompts: Sequence[Prompt], store: PartialResults, seed: int) -> dict[str, Any]:
    """The prompts through both models: all of them in the first state, the first of each group in the next.

    Args:
        pair: the models.
        prompts: the prompts.
        store: keeps what is known already.
        seed: of the random adapter.

    Returns:
        `rows`, one for each state, group and whether tools are shown; `weights` by state; `adapter`.
    """
    report: dict[str, Any] = {"rows": [], "weights": {}, "adapter": {}}
    compare(pair, prompts[0], shows_tools=True, ours_first=True)  # warms up; not counted
    for state in states(pair, seed, report["adapter"]):
        tensors, different = compare_weights(pair)
        asked = first_of_each(prompts, ADAPTER_PROMPTS) if report["rows"] else prompts
        report["weights"][state] = {"compared": tensors, "different": different}
        for number, prompt in enumerate(tqdm(asked, state, unit="prompt")):
            for shows_tools in (False, True):
                key = f"{state}/{prompt.id}/{shows_tools}"
                if key not in store:
                    store.put(key, compare(pair, prompt, shows_tools, ours_first=number % 2 == 0))
        for group in dict.fromkeys(prompt.group for prompt in asked):
            for shows_tools in (False, True):
                keys = [f"{state}/{prompt.id}/{shows_tools}" for prompt in asked if prompt.group == group]
                row = {"model": state, "group": group, "tools": "shown" if shows_tools else "none"}
                report["rows"].append(row | summary([store[key] for key in keys]))
    return report


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Compare, print and write the result.

    Args:
        options: of `parse`.
        command: as it was typed, for the result.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    texts = text_prompts(options.data, options.limit)
    prompts = own_prompts(options.limit or PROMPTS, options.seed) + texts
    if not texts:
        print(f"{options.data / 'text'} holds no .jsonl.gz files: own prompts only.")
    pair = load_pair(options)
    store = PartialResults(options.out, {name: value for name, value in vars(options).items() if name != "out"})
    with store.kept_when_interrupted():
        report = measure(pair, prompts, store, options.seed)
    report = {
        "command": command,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": device_name(pair.model.device),
        "dtype": options.dtype,
        "base": options.base or "the model's own, loaded by transformers alone",
        "prompts": len(prompts),
        **report,
    }
    report["differences"] = differences(report)
    print(table(report["rows"]))
    print(f"weights: {report['weights']}\nadapter: {report['adapter']}")
    print(f"{len(prompts)} prompts, with and without tools; differences: {report['differences']}")
    store.finish(report)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        report = run(parse(arguments), shlex.join(["python", "-m", "eval.chat", *typed]))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.chat: {error}")
    if report["differences"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
