"""Turns the tokens of a reply, as they become final, into pieces of reasoning, text and calls.

Takes token ids in any portions; gives deltas whose concatenation does not depend on the portions. The arguments of a
call are the JSON text that the model wrote.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from serving.interface import Answer, ArgumentsDelta, CallStart, Delta, TextDelta

_NAME_START, _NAME_END = '\n{"name": "', '", "arguments": '
_CALL_END = "}\n"


class ReplyParser:
    """Reads one reply.

    Args:
        vocabulary: the model's tokens (`slot_grammar.Vocabulary`).
        may_call: whether calls are possible; without tools their markup is text.
        stops: texts that end the text; they are no part of it.
    """

    def __init__(self, vocabulary: Any, may_call: bool, stops: Sequence[str] = ()) -> None:
        self.vocabulary, self.may_call, self.stops = vocabulary, may_call, stops
        self.stopped = False
        self.content = self.reasoning = ""
        self.calls: list[tuple[str, str]] = []
        self._mode = "start"  # "start", "reasoning", "content", "name" or "arguments"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # read, but not known yet to be part of what is written out

    def feed(self, tokens: Iterable[int]) -> list[Delta]:
        """Read further tokens.

        Args:
            tokens: ids, in order.

        Returns:
            What they make final.
        """
        vocabulary, deltas = self.vocabulary, list[Delta]()
        for token in tokens:
            if token == vocabulary.think_start and self._mode == "start":
                self._mode = "reasoning"
            elif token == vocabulary.think_end and self._mode == "reasoning":
                deltas += self._end_text()
                self._mode = "content"
            elif token == vocabulary.call_start and self.may_call and self._mode in ("start", "content"):
                deltas += self._end_text()
                self._mode = "name"
            elif token == vocabulary.call_end and self._mode == "arguments":
                self._end_call()
            else:
                deltas += self._read(self._spelled(token))
        return _joined(deltas)

    def finish(self) -> list[Delta]:
        """The reply ends: what was held back."""
        if self._mode in ("name", "arguments"):
            raise ValueError("A reply ends inside a call.")
        return self._end_text()

    def answer(self, ends: bool, prompt_tokens: int, completion_tokens: int, stats: dict[str, Any]) -> Answer:
        """All of a reply that has been read.

        Args:
            ends: whether the model ended it by itself.
            prompt_tokens, completion_tokens, stats: as in `Answer`.
        """
        reason = "tool_calls" if self.calls else "stop" if ends or self.stopped else "length"
        return Answer(self.content, self.reasoning, list(self.calls), reason, prompt_tokens, completion_tokens, stats)

    def _spelled(self, token: int) -> str:
        # Tokens that spell no bytes are markup, which is shown, and the structure of a conversation, which is not.
        spelled = self.vocabulary.spell([token])
        if not spelled:
            return str(self.vocabulary.tokenizer.decode([token], skip_special_tokens=True))
        return self._decoder.decode(spelled)

    def _read(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._held += text
        if self._mode == "name":
            return self._read_name()
        if self._mode == "arguments":
            return self._write_arguments()
        if self._mode == "start":
            self._mode = "content"
        return self._write_text()

    # --------------------------------------------------------------- text

    def _write_text(self) -> list[Delta]:
        """Write out what can be no white space at an end and no beginning of a stop."""
        if self.stopped:
            self._held = ""
            return []
        thinks = self._mode == "reasoning"
        if not (self.reasoning if thinks else self.content):
            self._held = self._held.lstrip()
        found = [] if thinks else [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)].rstrip()
            return self._emit(len(self._held))
        most = len(self._held.rstrip())
        if not thinks:
            most = min([most, *(len(self._held) - _overlap(self._held, stop) for stop in self.stops)])
        return self._emit(len(self._held[:most].rstrip()))

    def _end_text(self) -> list[Delta]:
        deltas = self._read(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._held = self._held.rstrip()
        return deltas + self._emit(len(self._held))

    def _emit(self, size: int) -> list[Delta]:
        text, self._held = self._held[:size], self._held[size:]
        if not text:
            return []
        thinks = self._mode == "reasoning"
        if thinks:
            self.reasoning += text
        else:
            self.content += text
        return [TextDelta(text, thinks)]

    # --------------------------------------------------------------- calls

    def _read_name(self) -> list[Delta]:
        end = self._held.find(_NAME_END)
        if end < 0:
            return []
        name = json.loads(f'"{self._held[len(_NAME_START) : end]}"')
        self._held = self._held[end + len(_NAME_END) :]
        self._mode = "arguments"
        self.calls.append((name, ""))
        return [CallStart(len(self.calls) - 1, name), *self._write_arguments()]

    def _write_arguments(self) -> list[Delta]:
        """Write out all but what may close the call around its arguments."""
        ends = self._held.endswith(_CALL_END)
        held = len(_CALL_END) if ends else _overlap(self._held, _CALL_END)
        text, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        if not text:
            return []
        name, written = self.calls[-1]
        self.calls[-1] = name, written + text
        return [ArgumentsDelta(len(self.calls) - 1, text)]

    def _end_call(self) -> None:
        self._held, self._mode = "", "content"


def _joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Deltas with those that go on with the same text as one."""
    joined = list[Delta]()
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, CallStart) or last is None or replace(delta, text="") != _without_text(last):
            joined.append(delta)
        else:
            joined[-1] = replace(delta, text=last.text + delta.text)  # type: ignore[union-attr]
    return joined


def _without_text(delta: Delta) -> Delta:
    return delta if isinstance(delta, CallStart) else replace(delta, text="")


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
