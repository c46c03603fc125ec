"""Tokens and text of this model: special tokens, chat template, tool normalisation, the exact tokens of a call,
tokenizer building.

Takes tools, messages and any fast tokenizer; gives OpenAI-style tool dicts, call tokens and a tokenizer with our
template. Knows nothing of models, grammars or training.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import get_json_schema

from .schema_dialects import normalise_schema, normalise_tool

BOS_TOKEN = "<|begin_of_text|>"
END_OF_TEXT_TOKEN = "<|end_of_text|>"
PAD_TOKEN = "<|finetune_right_pad_id|>"
IM_START_TOKEN = "<|im_start|>"
IM_END_TOKEN = "<|im_end|>"
THINK_TOKEN = "<think>"
THINK_END_TOKEN = "</think>"
TOOL_CALL_TOKEN = "<tool_call>"
TOOL_CALL_END_TOKEN = "</tool_call>"
TOOL_RESPONSE_TOKEN = "<tool_response>"
TOOL_RESPONSE_END_TOKEN = "</tool_response>"

SPECIAL_TOKENS = (BOS_TOKEN, END_OF_TEXT_TOKEN, PAD_TOKEN, IM_START_TOKEN, IM_END_TOKEN)
"""Structure of a conversation; dropped by `skip_special_tokens=True`."""
MARKUP_TOKENS = (
    THINK_TOKEN,
    THINK_END_TOKEN,
    TOOL_CALL_TOKEN,
    TOOL_CALL_END_TOKEN,
    TOOL_RESPONSE_TOKEN,
    TOOL_RESPONSE_END_TOKEN,
)
"""Atomic but part of the reply's text; kept by `skip_special_tokens=True`, so that parsers see them."""

CALL_OPENING = '\n{"name": "'
"""The fixed text between `<tool_call>` and the tool's name."""

# A Unicode noncharacter: no ordinary text holds it, and texts that do are escaped by doubling it up with a digit.
_MARK = "\ufdd0"
# A lone space is a token of its own, so a word has the same tokens behind a space and behind a quote: copying a value
# out of the prompt is identity on tokens. Punctuation takes a following space and quote, which makes
# `": "` and `", "` one token each.
_SPLIT = r'[\p{L}\p{M}]+|\p{N}| |[^\s\p{L}\p{M}\p{N}]+(?: "?)?|\s+'

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{IM_START_TOKEN}assistant\n",
    "fields": {
        "reasoning_content": {"open": f"{THINK_TOKEN}\n", "close_pattern": r"\s*</think>\s*", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>(?=\n\{)",
            # JSON escapes line breaks, so a raw one before the end token cannot lie inside an argument.
            "close": f"\n{TOOL_CALL_END_TOKEN}",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>\s*", "content": "text"},
    },
}
"""What `parse_response` of transformers reads to turn a reply into an OpenAI-style message."""


# Kept here and not in a file, because code that the Hub loads comes without the files beside it; saving a tokenizer
# writes it to chat_template.jinja.
CHAT_TEMPLATE = r"""{#- Content never becomes markup: `<` gets a mark behind it, which the tokenizer's normalizer removes again. -#}
{%- macro plain(text) -%}
    {{- text | replace('\ufdd0', '\ufdd00') | replace('<', '<\ufdd01') -}}
{%- endmacro -%}
{%- macro said(content) -%}
    {%- if content is string -%}
        {{- plain(content) -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- plain(part) -}}
            {%- elif part.type == 'text' -%}
                {{- plain(part.text) -}}
            {%- else -%}
                {{- raise_exception('This model reads text only: a message has a content part of type "' ~ part.type ~ '".') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- elif content -%}
        {{- plain(content | tojson) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro called(calls) -%}
    {%- for item in calls -%}
        {%- set call = item.function if item.function is defined else item -%}
        {{- '<tool_call>\n{"name": ' ~ plain(call.name | tojson) ~ ', "arguments": ' -}}
        {{- plain(call.arguments if call.arguments is string else call.arguments | default({}, true) | tojson) -}}
        {{- '}\n</tool_call>' ~ ('' if loop.last else '\n') -}}
    {%- endfor -%}
{%- endmacro -%}
{%- if not messages -%}
    {{- raise_exception('The list of messages is empty: pass at least one message.') -}}
{%- endif -%}
{%- set thinks = enable_thinking | default(false) -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set ns.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\nReasoning Mode: ' ~ ('/think' if thinks else '/no_think') -}}
{%- if date is defined and date -%}
    {{- '\nToday: ' ~ plain(date) -}}
{%- endif -%}
{%- if messages[0].role in ['system', 'developer'] -%}
    {%- set instructions = said(messages[0].content) -%}
    {%- if instructions -%}
        {{- '\n\n' ~ instructions -}}
    {%- endif -%}
{%- endif -%}
{%- if tools -%}
    {{- '\n\nTools to call when needed:\n<tools>\n' -}}
    {%- for tool in tools -%}
        {{- plain((tool.function if tool.function is defined else tool) | tojson) ~ '\n' -}}
    {%- endfor -%}
    {{- '</tools>' -}}
{%- elif (instructions or date | default('', true) | string).endswith('/tools>') -%}
    {#- A block of tools ends the system block; a text that only looks like one does not. -#}
    {{- '\n' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' ~ said(message.content) ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
            {{- '<think>\n' ~ plain(message.reasoning_content) ~ '\n</think>\n' -}}
        {%- endif -%}
        {%- set text = said(message.content) -%}
        {{- text -}}
        {%- if message.tool_calls -%}
            {{- ('\n' if text else '') ~ called(message.tool_calls) -}}
        {%- endif -%}
        {{- '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>tool\n<tool_response>\n' ~ said(message.content) ~ '\n</tool_response><|im_end|>\n' -}}
    {%- elif message.role in ['system', 'developer'] -%}
        {%- if not loop.first -%}
            {{- '<|im_start|>system\n' ~ said(message.content) ~ '<|im_end|>\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Unknown role "' ~ message.role ~ '": use system, user, assistant or tool.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' ~ ('' if thinks else '<think>\n\n</think>\n') -}}
{%- endif -%}
"""  # noqa: E501


def escape_content(text: str) -> str:
    """Mark text so that no added token can match inside it; the tokenizer's normalizer undoes it exactly.

    Args:
        text: any text.

    Returns:
        The marked text: the same tokens as `text` would have if it held no added token. The chat template does the
        same.
    """
    return text.replace(_MARK, _MARK + "0").replace("<", "<" + _MARK + "1")


def call_segments(name: str, arguments: dict[str, Any]) -> list[str]:
    """Cut the text of one call into fixed text and values, the units that are encoded one by one.

    Args:
        name: the tool's name.
        arguments: JSON object of the arguments.

    Returns:
        `<tool_call>`, the opening, the escaped name, then fixed text and leaves in turn, and `</tool_call>`; fixed
        text is also cut behind an empty object or array. Joined they are
        `<tool_call>\\n` + `json.dumps({"name": ..., "arguments": ...}, ensure_ascii=False)` + `\\n</tool_call>`. An
        empty string leaf is an empty segment.

    Raises:
        ValueError: the arguments are no JSON object (other types, NaN, keys that are not strings).

    >>> call_segments("get_weather", {"city": "Oslo", "days": 3})[3:]
    ['", "arguments": {"city": "', 'Oslo', '", "days": ', '3', '}}\\n', '</tool_call>']
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"The arguments of a call to {name!r} must be a dict, not {type(arguments).__name__}.")
    segments = [TOOL_CALL_TOKEN, CALL_OPENING, _json(name)[1:-1]]
    fixed = ['", "arguments": ']

    def leaf(text: str) -> None:
        segments.extend(["".join(fixed), text])
        fixed.clear()

    def walk(value: Any) -> None:
        if isinstance(value, (dict, list, tuple)) and not value:
            # An empty container closes its segment: what follows it is a choice of its own (next property, or the end).
            segments.append("".join(fixed) + ("{}" if isinstance(value, dict) else "[]"))
            fixed.clear()
        elif isinstance(value, dict):
            fixed.append("{")
            for index, (key, item) in enumerate(value.items()):
                if not isinstance(key, str):
                    raise ValueError(f"A key of the arguments of {name!r} is {key!r}: JSON keys must be strings.")
                fixed.append((", " if index else "") + _json(key) + ": ")
                walk(item)
            fixed.append("}")
        elif isinstance(value, (list, tuple)):
            fixed.append("[")
            for index, item in enumerate(value):
                fixed.append(", " if index else "")
                walk(item)
            fixed.append("]")
        elif isinstance(value, str):
            fixed.append('"')
            leaf(_json(value)[1:-1])
            fixed.append('"')
        else:
            leaf(_json(value))

    walk(arguments)
    return [*segments, "".join(fixed) + "}\n", TOOL_CALL_END_TOKEN]


def call_token_ids(tokenizer: PreTrainedTokenizerFast, name: str, arguments: dict[str, Any]) -> list[int]:
    """Encode one call segment by segment, the tokens that scaffold, grammar and training agree on.

    Args:
        tokenizer: a tokenizer of `build_tokenizer` or `train_tokenizer`.
        name: the tool's name.
        arguments: JSON object of the arguments.

    Returns:
        Token ids from `<tool_call>` to `</tool_call>`.

    Raises:
        ValueError: as `call_segments`.
    """
    opening, *inner, closing = call_segments(name, arguments)
    texts = [opening, *map(escape_content, inner), closing]
    return [token for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in ids]


def calls_token_ids(tokenizer: PreTrainedTokenizerFast, calls: Iterable[tuple[str, dict[str, Any]]]) -> list[int]:
    """Encode the calls of one reply, joined by a line break.

    Args:
        tokenizer: a tokenizer of `build_tokenizer` or `train_tokenizer`.
        calls: (name, arguments) of each call.

    Returns:
        Token ids of the reply without its end token.
    """
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for name, arguments in calls:
        ids += (line_break if ids else []) + call_token_ids(tokenizer, name, arguments)
    return ids


def normalise_tools(tools: Sequence[dict[str, Any] | Callable[..., Any]] | None) -> list[dict[str, Any]]:
    """Bring tools of any accepted form into the OpenAI form.

    Args:
        tools: OpenAI tools `{"type": "function", "function": {...}}`, any other form that
            `schema_dialects.normalise_tool` knows (flat, Anthropic, MCP, pydantic models), or Python functions with
            type hints and a Google-style docstring; None is no tools.

    Returns:
        New OpenAI-style dicts; a tool without parameters gets an empty object schema. Schemas are not changed.

    Raises:
        ValueError: names the index of the faulty tool and the fault.

    >>> normalise_tools([{"name": "now", "input_schema": {"type": "object", "properties": {}}}])
    [{'type': 'function', 'function': {'name': 'now', 'parameters': {'type': 'object', 'properties': {}}}}]
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, dict)) or not isinstance(tools, Sequence):
        raise ValueError(f"tools must be a list of tools, not {type(tools).__name__}: put a single tool into a list.")
    normalised: list[dict[str, Any]] = []
    first_index: dict[str, int] = {}
    for index, tool in enumerate(tools):
        function = _tool_function(index, tool)
        name = function["name"]
        if name in first_index:
            raise ValueError(
                f"tools[{index}] and tools[{first_index[name]}] are both named {name!r}: "
                "give each tool a name of its own."
            )
        first_index[name] = index
        normalised.append({"type": "function", "function": function})
    return normalised


def tools_from_prompt_ids(tokenizer: PreTrainedTokenizerFast, input_ids: Sequence[int]) -> list[dict[str, Any]] | None:
    """Read the tools back out of a prompt of our chat template.

    Only the leading system block counts, found by the ids of the special tokens: text of users, tools and assistants
    cannot add tools.

    Args:
        tokenizer: the tokenizer that made the prompt.
        input_ids: token ids of one prompt; padding and `<|begin_of_text|>` may stand in front.

    Returns:
        OpenAI-style tools, or None where the prompt has no block of tools.

    Raises:
        ValueError: a line of the block is no tool.
    """
    lines = _leading_system_text(tokenizer, input_ids).split("\n")
    if lines[0] != "system" or lines[-1] != "</tools>" or "<tools>" not in lines:
        return None
    start = len(lines) - 1 - lines[::-1].index("<tools>")
    try:
        tools = [json.loads(line) for line in lines[start + 1 : -1]]
    except json.JSONDecodeError as error:
        raise ValueError(f"The prompt's <tools> block holds a line that is not JSON ({error}): pass tools=.") from error
    return normalise_tools(tools)


def thinking_from_prompt_ids(tokenizer: PreTrainedTokenizerFast, input_ids: Sequence[int]) -> bool:
    """Whether a prompt of the chat template was made with `enable_thinking`, by its leading system block.

    Args:
        tokenizer: the tokenizer that made the prompt.
        input_ids: token ids of one prompt; padding and `<|begin_of_text|>` may stand in front.

    Returns:
        True where the template asked for thinking; texts of the conversation cannot.
    """
    return _leading_system_text(tokenizer, input_ids).split("\n")[:2] == ["system", "Reasoning Mode: /think"]


def build_tokenizer(base: str | Path | PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give a base model's tokenizer our special tokens, chat template, escape normalizer and response template.

    Args:
        base: a fast tokenizer (changed in place) or a repository id or folder, such as `HuggingFaceTB/SmolLM3-3B`.

    Returns:
        The tokenizer. Ids of existing tokens stay; missing special tokens get new ids at the end.

    Raises:
        ValueError: the tokenizer is not a fast one, or an added token does not start with `<` and so could not be
            escaped in content.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False) if isinstance(base, (str, Path)) else base
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: use one that loads from tokenizer.json.")
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    markup = [token for token in MARKUP_TOKENS if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in markup])
    for token in tokenizer.added_tokens_decoder.values():
        if not token.content.startswith("<"):
            raise ValueError(
                f"The added token {token.content!r} does not start with '<', so user text could forge it: "
                "remove it from the tokenizer."
            )
    tokenizer.backend_tokenizer.normalizer = _with_unescaping(tokenizer.backend_tokenizer.normalizer)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BOS_TOKEN, IM_END_TOKEN, PAD_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE of the embedded default model.

    Args:
        texts: training texts.
        vocab_size: number of tokens, special tokens included.

    Returns:
        A tokenizer with our special tokens (the last ids), chat template and response template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return build_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096))


def _json(value: Any) -> str:
    """`json.dumps` as the contract of the call text wants it; refuses NaN and foreign types by ValueError."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} cannot be written as JSON: {error}.") from error


def _tool_function(index: int, tool: Any) -> dict[str, Any]:
    """The function object of one tool, checked."""
    try:
        is_function = callable(tool) and not hasattr(tool, "model_json_schema")
        tool = get_json_schema(tool) if is_function else normalise_tool(tool)
    except Exception as error:  # transformers raises its own kinds, one per docstring fault
        given = "is a function that gives no schema" if callable(tool) else "cannot be read"
        raise ValueError(f"tools[{index}] {given}: {error}") from error
    function = tool.get("function", tool) if tool.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        raise ValueError(f'tools[{index}] must be {{"type": "function", "function": {{...}}}} or a schema with a name.')
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"tools[{index}] has no name: it needs a non-empty string under 'name'.")
    try:
        # A copy through JSON: the caller's dict stays untouched, and what cannot be written into the prompt shows here.
        function = json.loads(json.dumps(function, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"tools[{index}] ({name!r}) cannot be written as JSON: {error}.") from error
    if function.get("parameters") is None:
        function["parameters"] = {"type": "object", "properties": {}}
    parameters = function["parameters"]
    if not isinstance(parameters, dict) or not _may_be_object(parameters.get("type")):
        shown = str(parameters)[:80]
        raise ValueError(f"tools[{index}] ({name!r}) has parameters that are not an object schema: {shown}.")
    return function


def _may_be_object(kind: Any) -> bool:
    """Whether a `type`, in any dialect, allows an object; an absent one does."""
    named = normalise_schema({"type": kind}, "")[0].get("type", "object")
    return "object" in (named if isinstance(named, list) else [named])


def _leading_system_text(tokenizer: PreTrainedTokenizerFast, input_ids: Sequence[int]) -> str:
    """Text of the block that opens the prompt, role line included; empty where the prompt opens without one."""
    start_id, end_id = tokenizer.convert_tokens_to_ids([IM_START_TOKEN, IM_END_TOKEN])
    skipped = {tokenizer.pad_token_id, tokenizer.bos_token_id}
    ids = [int(token) for token in input_ids]
    position = next((i for i, token in enumerate(ids) if token not in skipped), len(ids))
    if position == len(ids) or ids[position] != start_id or end_id not in ids:
        return ""
    return tokenizer.decode(ids[position + 1 : ids.index(end_id, position)], skip_special_tokens=False)


def _with_unescaping(normalizer: normalizers.Normalizer | None) -> normalizers.Normalizer:
    """The normalizer that undoes `escape_content` in front of an existing one."""
    undo: list[normalizers.Normalizer] = [normalizers.Replace(_MARK + "1", ""), normalizers.Replace(_MARK + "0", _MARK)]
    if normalizer is not None and _MARK in str(normalizer.__getstate__()):
        return normalizer  # built before: saved and loaded again
    return normalizers.Sequence(undo + ([] if normalizer is None else [normalizer]))
