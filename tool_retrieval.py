"""Which of many tools a prompt shows: what a `tool_retriever` may return, and one that goes by embeddings.

Takes a conversation and tools, OpenAI style; gives a few of the tools, the most relevant first. Knows nothing of models
and prompts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

Tool = dict[str, Any]
Message = Mapping[str, Any]
ToolRetriever = Callable[[Sequence[Message], Sequence[Tool]], Sequence[Tool]]
"""Takes the messages of a conversation and normalised tools; gives some of these tools, the most relevant first."""

MAX_KEPT = 16
"""Tools that stay in because the conversation has called them; those that it called last."""
MAX_TEXT = 1000
"""Characters of a text that is embedded."""
MIN_SENTENCE = 8
"""Characters of a sentence that is embedded by itself; a shorter one says too little."""
MAX_PARTS = 16
"""Texts that are embedded of a conversation."""
MAX_CACHED = 4096
"""Embeddings of tools that a retriever keeps."""

_SENTENCE_END = re.compile(r"(?<=[.?!;])\s+|\n+")
_BETWEEN_WORDS = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_]+")

# ---------------------------------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------------------------------


def retrieve_tools(
    retriever: ToolRetriever, messages: Sequence[Message], tools: Sequence[Tool], tool_choice: Any
) -> list[Tool]:
    """Ask a retriever for the tools of a prompt, and check what it returns.

    Args:
        retriever: the user's callable.
        messages: the conversation, OpenAI style.
        tools: all tools, normalised, with names of their own.
        tool_choice: as in the OpenAI API.

    Returns:
        Those of `tools` that the retriever returned, in its order; behind them the tool that `tool_choice` names and
        the tools that the conversation called last, where the retriever left them out.

    Raises:
        ValueError: it is no callable, or returned something else than some of the tools, each once, or nothing
            although a call is required.
    """
    if not callable(retriever):
        raise ValueError(
            f"tool_retriever={retriever!r} cannot be called: pass a function of (messages, tools) that returns some of "
            "the tools."
        )
    if not tools:
        return []
    by_name = {_name(tool): tool for tool in tools}
    names = _returned_names(retriever(list(messages), list(tools)), by_name)
    wanted = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    named: list[Any] = [wanted.get("name")] if isinstance(wanted, Mapping) else []
    names += [name for name in [*named, *called_names(messages)] if name in by_name]
    if not names and tool_choice == "required":
        raise ValueError(
            f'tool_choice="required" needs a tool, but tool_retriever returned none of the {len(tools)}: let it return '
            'at least one, or use tool_choice="auto".'
        )
    return [by_name[name] for name in dict.fromkeys(names)]


def _returned_names(returned: Any, given: Mapping[str, Tool]) -> list[str]:
    """Names of the tools that a retriever returned, checked."""
    if not isinstance(returned, list | tuple):
        raise ValueError(f"tool_retriever returned a {type(returned).__name__}: let it return a list of tools.")
    names = [_name(tool) for tool in returned]
    for place, name in enumerate(names):
        if name not in given:
            shown = f"a tool named {name!r}" if isinstance(name, str) else f"{str(returned[place])[:80]}"
            raise ValueError(
                f"tool_retriever returned {shown}, which is none of the {len(given)} tools that it was given: let it "
                "return some of them."
            )
        if name in names[:place]:
            raise ValueError(f"tool_retriever returned {name!r} twice: let it return each tool once.")
    return names


def called_names(messages: Sequence[Message]) -> list[str]:
    """Names of the tools that a conversation called last, at most `MAX_KEPT`, the latest first."""
    found: dict[str, None] = {}
    for message in reversed(messages):
        calls = message.get("tool_calls")
        for call in reversed(calls if isinstance(calls, list | tuple) else []):
            name = _name(call)
            if isinstance(name, str) and len(found) < MAX_KEPT:
                found[name] = None
    return list(found)


def _name(tool: Any) -> Any:
    """The name in a tool or call, with or without `function` around it; None where there is none."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def tool_text(tool: Tool) -> str:
    """What is embedded of a tool: its name in words, its description, and the names of its parameters in words.

    Args:
        tool: OpenAI style.

    Returns:
        At most `MAX_TEXT` characters.
    """
    function = tool["function"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    names = [_words(name[:MAX_TEXT]) for name in properties] if isinstance(properties, Mapping) else []
    parts = [_words(function["name"][:MAX_TEXT]), str(function.get("description") or ""), ", ".join(names)]
    return ". ".join(part.strip(". ") for part in parts if part)[:MAX_TEXT]


@lru_cache(maxsize=MAX_CACHED)
def _words(name: str) -> str:
    """An identifier in words: `getUser_ID` becomes `get User ID`."""
    return _BETWEEN_WORDS.sub(" ", name).strip()


def request_texts(messages: Sequence[Message]) -> list[str]:
    """What is embedded of a conversation: the turns of the user as one text, and the sentences of the latest.

    A request for several things is like no single tool as a whole, while each of its sentences is like one.

    Args:
        messages: OpenAI style.

    Returns:
        At most `MAX_PARTS` texts of at most `MAX_TEXT` characters: all turns, the latest first, then its sentences;
        none where the user said nothing.
    """
    said = [_said(message.get("content")) for message in reversed(messages) if message.get("role") == "user"]
    turns = [text for text in said if text]
    if not turns:
        return []
    sentences = [text.strip() for text in _SENTENCE_END.split(turns[0][:MAX_TEXT])]
    parts = ["\n".join(turns)[:MAX_TEXT], *(text for text in sentences if len(text) >= MIN_SENTENCE)]
    return list(dict.fromkeys(parts))[:MAX_PARTS]


def _said(content: Any) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, str):
        return content.strip()
    parts = content if isinstance(content, list | tuple) else []
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return " ".join(text.strip() for text in texts if isinstance(text, str))


# ---------------------------------------------------------------------------------------------------------------------
# By embeddings
# ---------------------------------------------------------------------------------------------------------------------


class EmbeddingRetriever:
    """A `tool_retriever`: the tools whose texts are most like the user's, by the cosine of their embeddings.

    A tool counts as much as the text of the user that it is most like (see `request_texts`). Equal ones go in the order
    in which they were given. No more than `top_k` tools come back as they are. Embeddings of tools are kept by their
    text, at most `MAX_CACHED`.

    Args:
        embed: takes texts; gives an array or tensor of numbers [texts, dimension], one row a text.
        top_k: most tools to return.

    Raises:
        ValueError: `embed` cannot be called, or `top_k` is no whole number from 1.
    """

    def __init__(self, embed: Callable[[list[str]], Any], top_k: int = 8) -> None:
        if not callable(embed):
            raise ValueError(f"embed={embed!r} cannot be called: pass a function of a list of texts.")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k={top_k!r} is out of range: use a whole number from 1.")
        self.embed, self.top_k = embed, top_k
        # Replaced as a whole, never changed: threads may share a retriever.
        self._known: dict[str, Tensor] = {}

    @classmethod
    def from_sentence_transformers(cls, name: str, top_k: int = 8) -> "EmbeddingRetriever":
        """A retriever with a model of the sentence-transformers library.

        Args:
            name: repo or folder of the model, such as `"sentence-transformers/all-MiniLM-L6-v2"`.
            top_k: most tools to return.

        Returns:
            The retriever.

        Raises:
            ImportError: sentence-transformers is not installed.
            OSError: there is no such model.
        """
        model = _sentence_transformers().SentenceTransformer(name)
        return cls(lambda texts: model.encode(texts, show_progress_bar=False), top_k)

    @torch.no_grad()
    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Tool]:
        """The tools for a conversation, the most relevant first.

        Args:
            messages: the conversation, OpenAI style.
            tools: OpenAI style.

        Returns:
            At most `top_k` of the tools.

        Raises:
            ValueError: `embed` gave no array of that shape, or numbers that are not finite.
        """
        texts = request_texts(messages)
        if len(tools) <= self.top_k or not texts:
            return list(tools[: self.top_k])
        # Not at once with the tools, of which most are known.
        vectors, wanted = self._of_tools([tool_text(tool) for tool in tools]), self._embedded(texts)
        if vectors.shape[1] != wanted.shape[1]:
            raise ValueError(f"embed gave vectors of {vectors.shape[1]} and of {wanted.shape[1]} numbers.")
        # Rounded, so that equal tools tie wherever they stand: sums over rows may differ in their last bits.
        scores = (vectors.double() @ wanted.double().T).amax(dim=1).round(decimals=6).tolist()
        best = sorted(range(len(tools)), key=lambda place: -scores[place])  # stable
        return [tools[place] for place in best[: self.top_k]]

    def _of_tools(self, texts: list[str]) -> Tensor:
        """Unit vectors of tools, float32 [texts, dimension]; those that are not known yet are embedded at once."""
        known = self._known
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            fresh = dict(zip(missing, self._embedded(missing), strict=True))
            used = {text: known[text] if text in known else fresh[text] for text in texts}
            known = {**used, **known}
            # What this request has not asked for goes first.
            self._known = dict(list(known.items())[:MAX_CACHED])
        return torch.stack([known[text] for text in texts])

    def _embedded(self, texts: list[str]) -> Tensor:
        """Unit vectors of texts, float32 [texts, dimension]."""
        returned = self.embed(texts)
        try:
            vectors = torch.as_tensor(returned, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"embed gave a {type(returned).__name__} that is no array of numbers ({error}): let it return "
                "[texts, dimension]."
            ) from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
            raise ValueError(
                f"embed gave shape {list(vectors.shape)} for {len(texts)} texts: let it return [texts, dimension]."
            )
        if not bool(vectors.isfinite().all()):
            raise ValueError("embed gave numbers that are not finite: a text could not be embedded.")
        return normalize(vectors)


def _sentence_transformers() -> Any:
    """The sentence-transformers library."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError(
            "Embeddings of sentence-transformers need that library: pip install sentence-transformers."
        ) from error
    return sentence_transformers
