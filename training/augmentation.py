"""Records seen in other words: tools renamed, reordered, described less, or taken away from under a request.

Takes a record and a source of randomness; gives a record whose calls fit its tools as well as before. What names and
descriptions say is changed, what is asked for never is. No tokenizer, no files.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any

from .records import Record, bare_call


@dataclass(frozen=True)
class Augmentation:
    """How often a drawn record is changed, as shares in [0, 1]; the tools are shuffled in any case.

    Masked names teach a model to read what a tool's description says instead of trusting its name: Hammer (arXiv
    2410.04587). Most rows keep what their authors wrote, since that is what will be met; a change of style costs
    nothing and is drawn more often than one that hides something.

    Args:
        restyle_functions: all function names of a record go to one other style: snake, camel, Pascal, dotted, kebab.
        mask_functions: described functions get names that mean nothing, such as `func_7`.
        restyle_parameters: all parameter names of a record go to one other style.
        mask_parameters: described parameters get names that mean nothing.
        shuffle_properties: the parameters of each function are put in another order.
        shorten_descriptions: descriptions keep their first words only.
        drop_descriptions: descriptions are left out, unless something was masked.
    """

    restyle_functions: float = 0.15
    mask_functions: float = 0.05
    restyle_parameters: float = 0.1
    mask_parameters: float = 0.03
    shuffle_properties: float = 0.15
    shorten_descriptions: float = 0.1
    drop_descriptions: float = 0.05

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0 <= getattr(self, one.name) <= 1:
                raise ValueError(f"{one.name} is a share: give a number from 0 to 1, not {getattr(self, one.name)}.")
        for kind in ("functions", "parameters"):
            if getattr(self, f"restyle_{kind}") + getattr(self, f"mask_{kind}") > 1:
                raise ValueError(f"restyle_{kind} and mask_{kind} exclude each other: their sum must not be over 1.")
        if self.shorten_descriptions + self.drop_descriptions > 1:
            raise ValueError("shorten_descriptions and drop_descriptions exclude each other: their sum is over 1.")

    @classmethod
    def none(cls) -> "Augmentation":
        """Records as they are."""
        return cls(**{one.name: 0.0 for one in fields(cls)})


@dataclass(frozen=True)
class Renaming:
    """New names of a record's tools.

    Args:
        functions: old name -> new name, of those that have one.
        parameters: old name of a function -> old -> new names of its parameters.
    """

    functions: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, dict[str, str]] = field(default_factory=dict)

    def name(self, function: str) -> str:
        """The new name of a function."""
        return self.functions.get(function, function)

    def call(self, call: Record) -> Record:
        """A call, wrapped or bare, in the new names."""
        if "function" in call:
            return {**call, "function": self.call(call["function"])}
        names = self.parameters.get(call["name"], {})
        arguments = {names.get(key, key): value for key, value in call["arguments"].items()}
        return {**call, "name": self.name(call["name"]), "arguments": arguments}

    def tool(self, tool: Record) -> Record:
        """A tool in the new names."""
        function = tool["function"]
        names = self.parameters.get(function["name"], {})
        parameters = dict(function["parameters"])
        if names:
            parameters["properties"] = {names.get(key, key): one for key, one in parameters["properties"].items()}
            if "required" in parameters:
                parameters["required"] = [names.get(key, key) for key in parameters["required"]]
        return {**tool, "function": {**function, "name": self.name(function["name"]), "parameters": parameters}}


def augment(record: Record, shares: Augmentation, rng: Random, described: bool = True) -> tuple[Record, Renaming]:
    """Change a record's tools, and its calls with them.

    Args:
        record: one record; it is not changed.
        shares: how often what is done.
        rng: draws what is done.
        described: descriptions will be shown; without them no name is masked, as nothing else would tell what it is.

    Returns:
        The new record, and what names became of the old ones.
    """
    if not record["tools"]:
        return record, Renaming()
    functions = _scheme(rng, shares.restyle_functions, shares.mask_functions * described)
    parameters = _scheme(rng, shares.restyle_parameters, shares.mask_parameters * described)
    renaming = _renaming(record, functions, parameters, rng)
    tools = [renaming.tool(tool) for tool in record["tools"]]
    if rng.random() < shares.shuffle_properties:
        tools = [_shuffled(tool, rng) for tool in tools]
    amount = rng.random()
    masked = "mask" in (functions, parameters)
    if amount < shares.shorten_descriptions:
        tools = shorten(tools, rng.randint(12, 60))
    elif amount < shares.shorten_descriptions + shares.drop_descriptions and not masked:
        tools = shorten(tools, 0)
    messages = [
        {**message, "tool_calls": [renaming.call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in record["messages"]
    ]
    calls = [renaming.call(call) for call in record["calls"]]
    return {**record, "messages": messages, "tools": tools, "calls": calls}, renaming


def shorten(schema: Any, description_chars: int) -> Any:
    """Copy of a function or schema whose descriptions are cut at a word, or left out where `description_chars` is 0."""
    if isinstance(schema, list):
        return [shorten(item, description_chars) for item in schema]
    if not isinstance(schema, dict):
        return schema
    short: Record = {}
    for key, value in schema.items():
        if key == "description" and isinstance(value, str):
            if len(value) > description_chars:
                value = value[: description_chars + 1].rsplit(" ", 1)[0].rstrip(",.;:( ")[:description_chars]
            if not value:
                continue
        short[key] = (
            {k: shorten(v, description_chars) for k, v in value.items()}
            if key == "properties"
            else (value if key in ("enum", "default", "required", "const") else shorten(value, description_chars))
        )
    return short


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

_STYLES: dict[str, Callable[[Sequence[str]], str]] = {
    "snake": "_".join,
    "camel": lambda words: words[0] + "".join(word.capitalize() for word in words[1:]),
    "pascal": lambda words: "".join(word.capitalize() for word in words),
    "kebab": "-".join,
    "dotted": lambda words: ".".join((words[0], "_".join(words[1:]))) if len(words) > 1 else words[0],
}
_FUNCTION_STYLES = tuple(_STYLES)
_PARAMETER_STYLES = ("snake", "camel", "pascal", "kebab")
_FUNCTION_MASKS = ("func_{n}", "tool_{n}", "fn{n}", "api_{n}", "{letters}", "{letters}_{n}")
_PARAMETER_MASKS = ("arg_{n}", "param{n}", "p{n}", "{letters}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9 _.\-]*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# Schemas that say no more about property names than these keywords do.
_PLAIN = {"type", "properties", "required", "additionalProperties", "description", "title"}


def _scheme(rng: Random, restyle: float, mask: float) -> str:
    """What is done to the names of a record: the name of a style, `mask`, or nothing."""
    drawn = rng.random()
    return "restyle" if drawn < restyle else "mask" if drawn < restyle + mask else ""


def _renaming(record: Record, functions: str, parameters: str, rng: Random) -> Renaming:
    """Draw new names: unlike each other and all old ones; what the conversation mentions keeps its name."""
    if not functions and not parameters:
        return Renaming()
    texts = [message.get("content") or "" for message in record["messages"]]
    said = "\n".join([*texts, record.get("answer") or "", record.get("think") or ""])
    found = [tool["function"] for tool in record["tools"]]
    style = rng.choice(_FUNCTION_STYLES)
    described = {one["name"]: bool(one.get("description")) for one in found}
    called = {bare_call(call)["name"] for message in record["messages"] for call in message.get("tool_calls") or ()}
    names = _new_names(described, called, functions, style, _FUNCTION_MASKS, said, rng)
    style = rng.choice(_PARAMETER_STYLES)
    renamed = {}
    for one in found:
        schema = one["parameters"]
        if parameters and _is_plain(schema):
            described = {
                key: isinstance(value, dict) and bool(value.get("description"))
                for key, value in schema["properties"].items()
            }
            used = _argument_names(record, one["name"])
            new = _new_names(described, used, parameters, style, _PARAMETER_MASKS, said, rng)
            if new:
                renamed[one["name"]] = new
    return Renaming(names, renamed)


def _new_names(
    described: dict[str, bool],
    used: Iterable[str],
    scheme: str,
    style: str,
    masks: Sequence[str],
    said: str,
    rng: Random,
) -> dict[str, str]:
    """Old -> new names of one name space; `described` holds its names, `used` further ones not to take."""
    new: dict[str, str] = {}
    taken = {*described, *used}
    for name, has_description in described.items():
        if not scheme or (scheme == "mask" and not has_description) or _mentions(said, name):
            continue
        made = _mask(masks, taken, rng) if scheme == "mask" else _restyled(name, style)
        if made and made not in taken:
            new[name] = made
            taken.add(made)
    return new


def _mask(masks: Sequence[str], taken: set[str], rng: Random) -> str:
    while True:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6)))
        made = rng.choice(masks).format(n=rng.randrange(1000), letters=letters)
        if made not in taken:
            return made


def _restyled(name: str, style: str) -> str:
    """The name in a style; empty where it is not made of plain words."""
    words = [word.lower() for word in _PART.findall(name)]
    return _STYLES[style](words) if words and _NAME.fullmatch(name) else ""


def _mentions(text: str, name: str) -> bool:
    """Whether a text speaks of a tool or parameter by its name. An ordinary word is no mention."""
    if name.isalpha() and (name.islower() or name.istitle()):
        return False
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _is_plain(schema: Record) -> bool:
    return (
        schema.keys() <= _PLAIN
        and isinstance(schema.get("properties"), dict)
        and schema.get("additionalProperties", False) in (True, False)
        and '"$' not in json.dumps(schema)  # a reference may point into the properties
    )


def _argument_names(record: Record, function: str) -> set[str]:
    calls = [bare_call(call) for message in record["messages"] for call in message.get("tool_calls") or ()]
    return {key for call in (*record["calls"], *calls) if call["name"] == function for key in call["arguments"]}


def _shuffled(tool: Record, rng: Random) -> Record:
    """The tool with its parameters in a drawn order."""
    function = tool["function"]
    properties = function["parameters"].get("properties")
    if not isinstance(properties, dict):
        return tool
    names = list(properties)
    rng.shuffle(names)
    parameters = {**function["parameters"], "properties": {name: properties[name] for name in names}}
    return {**tool, "function": {**function, "parameters": parameters}}


# ---------------------------------------------------------------------------------------------------------------------
# Negatives
# ---------------------------------------------------------------------------------------------------------------------

# Words that tools share without being alike.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an the of to for and or in on at by with from is are be this that it as all any given specific based get "
        "set tool function api use used using user return retrieve provide information detail data about can your you",
    )
)


def without_called_tools(record: Record) -> Record | None:
    """A request none of whose tools is left: the called ones and those like them are taken out, and nothing is called.

    Negatives made by removal teach when not to call: MediaTek (arXiv 2412.01130).

    Args:
        record: one record.

    Returns:
        The record without a call, or None where that would be wrong: it is no single request, or no other tool is left
        that is unlike the called ones.
    """
    roles = [message["role"] for message in record["messages"] if message["role"] != "system"]
    if not record["calls"] or roles != ["user"]:
        return None
    called = {call["name"] for call in record["calls"]}
    gone = [tool["function"] for tool in record["tools"] if tool["function"]["name"] in called]
    kept = [tool for tool in record["tools"] if not any(_alike(tool["function"], one) for one in gone)]
    if not kept:
        return None
    fields = {name: value for name, value in record.items() if name not in ("answer", "think")}
    return {**fields, "id": f"{record['id']}-removed", "tools": kept, "calls": []}


def _alike(one: Record, other: Record) -> bool:
    """Whether two functions may do the same: half of the words of one are the other's, or they ask for the same."""
    if one["name"] == other["name"]:
        return True
    properties = [set(function["parameters"].get("properties") or ()) for function in (one, other)]
    if len(properties[0]) > 2 and properties[0] == properties[1]:  # one or two names, many tools share
        return True
    names = [_words(function["name"]) for function in (one, other)]
    texts = [_words(f"{function['name']} {function.get('description') or ''}") for function in (one, other)]
    return _share(*names) >= 0.5 or _share(*texts) >= 0.5


def _words(text: str) -> set[str]:
    # A plural is the same word.
    return {word.lower().removesuffix("s") for word in _PART.findall(text)} - _COMMON


def _share(one: set[str], other: set[str]) -> float:
    """Part of the smaller set that is in the larger one."""
    return len(one & other) / max(min(len(one), len(other)), 1)
