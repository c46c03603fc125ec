"""The answer as HTML: route, a picture of the denoising frame by frame, what the base checked, the call, the cost.

Takes an `Answer`; gives HTML in which every text of the model and of the visitor is escaped. `page.css` gives it its
looks and `page.js` moves it; without either all frames stand one below the other.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from demo import first_canvas

from .asking import Answer, Run

DECODINGS = {"verified": "Draft and check", "diffusion": "Draft alone", "ar": "Base alone"}

# Between properties and in front of the first: where the picture breaks lines.
_BREAK = re.compile(r'(?<="arguments": \{)(?=.)|(?<=, )(?="(?!arguments": ))')
_STRUCTURE = re.compile(r'[\s",{}\[\]\\]')


@dataclass(frozen=True)
class Span:
    """A piece of text in one look.

    Args:
        look: `"fixed"` (from the schema), `"mask"`, `"new"` (drafted in this step), `"kept"` (drafted before), `"sure"`
            (kept or written by the base), `"absent"` (a property that is left out), `"chip"` (a decision of the
            draft), `"accepted"`, `"drafted"` and `"chosen"` (of a check), `"text"` (words of the page).
        text: as it is; a mask has none.
    """

    look: str
    text: str = ""


@dataclass(frozen=True)
class Frame:
    """One picture.

    Args:
        title: what it shows, in a word or two.
        caption: what happened, in a sentence; spans of the look `"text"` are words, the others texts of the call.
        spans: the call.
    """

    title: str
    caption: tuple[Span, ...]
    spans: tuple[Span, ...]


def frames(trace: Sequence[Any], texts: Sequence[str]) -> list[Frame]:
    """The pictures of a trace: for each call its scaffold, every denoising step and every check, at last the result.

    Args:
        trace: events of the model.
        texts: of the reply, as in `Answer`.

    Returns:
        The frames in the order in which things happened; none where nothing was drafted.
    """
    written, starts = "".join(texts), _call_starts(texts)
    shown, call, step, checks, place = list[Frame](), -1, 0, 0, min(starts, default=0)
    before: list[Any] = []
    for event in trace:
        data = event.data
        if event.kind == "draft":
            if data["call"] != call:
                call, step, checks = data["call"], 0, 0
                place = max(place, starts[call] if call < len(starts) else 0)
                before = first_canvas(data["canvas"])
                shown.append(_scaffold_frame(before, call))
            step += 1
            sure = len(_letters(written[starts[call] : place])) if checks and call < len(starts) else 0
            shown.append(_step_frame(data["canvas"], before, step, sure))
            before = data["canvas"]
        elif event.kind == "verify" and data["accepted"] + data["chosen"]:
            checks += 1
            found = written.find(data["accepted"] + data["chosen"], place)
            # A token that is half a character cannot be found in the text; the picture then goes on from where it was.
            front = found if found >= 0 else place
            begin = max((start for start in starts if start <= front), default=0)
            shown.append(_check_frame(data, written[begin:front], checks))
            place = front + len(data["accepted"]) + len(data["chosen"]) if found >= 0 else place
    if shown:
        whole = "".join(text for text in texts if text.startswith("<tool_call>"))
        shown.append(
            Frame("Done", _words("The finished call, as it stands in the reply."), tuple(_broken(whole, "sure")))
        )
    return shown


def answer_html(answer: Answer) -> str:
    """The whole result.

    Args:
        answer: what the model did.
    """
    calls = answer.message.get("tool_calls")
    parts = [_route(answer)]
    pictures = frames(answer.trace, answer.texts)
    if pictures:
        parts.append(_section("How the call was written", _player(pictures)))
    checks = [event.data for event in answer.trace if event.kind == "verify"]
    if checks and answer.runs[0].decoding == "verified":
        parts.append(_section("What the base made of the draft", _checks(checks)))
    if calls:
        found = json.dumps([call["function"] for call in calls], ensure_ascii=False, indent=2)
        code = f'<pre class="sd-code" tabindex="0" aria-label="The call as JSON">{escape(found)}</pre>'
        parts.append(_section("The call" if len(calls) == 1 else "The calls", code + _cut(answer.cut)))
    else:
        parts.append(
            _section("The answer", f'<p class="sd-answer">{escape(answer.message["content"]) or "(no text)"}</p>')
        )
    parts.append(_section("What it cost", _cost(answer)))
    return f'<div class="sd">{"".join(parts)}</div>'


def summary(answer: Answer) -> str:
    """One sentence on the result for those who hear the page, as plain text."""
    calls = answer.message.get("tool_calls")
    if not calls:
        return f"The model answers in text: {answer.message['content']}"
    shown = ", ".join(
        f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})" for call in calls
    )
    return f"The model calls {shown}, in {_count(answer.runs[0].base_forwards, 'base forward')}."


def alert(message: str) -> str:
    """A message that something cannot be done, and why.

    Args:
        message: plain text.
    """
    return f'<div class="sd"><p class="sd-alert">{escape(message)}</p></div>'


def welcome() -> str:
    """What stands where the result will be."""
    spans = _broken('{"name": "get_weather", "arguments": {"city": "', "fixed")
    spans += [Span("mask")] * 8 + [Span("fixed", '"}}')]
    picture = f'<div class="sd-stage"><div class="sd-canvas">{_spans(spans)}</div></div>'
    steps = (
        "The base model reads the request and decides: talk, or call a tool, and which.",
        "The tool’s schema becomes a scaffold: fixed text, with blanks for the values.",
        "A small diffusion head fills all blanks at once, in a few denoising steps.",
        "The base checks the draft in one pass, and replaces what it would not have written.",
    )
    items = "".join(f"<li>{step}</li>" for step in steps)
    return f'<div class="sd sd-welcome">{_section("What you will see", f"{picture}<ol>{items}</ol>")}</div>'


# --------------------------------------------------------------- frames


def _scaffold_frame(canvas: Sequence[Any], call: int) -> Frame:
    """The call with all slots masked."""
    title = "Scaffold" if call == 0 else f"Scaffold of call {call + 1}"
    caption = _words("Fixed text comes from the schema; every value is masked.")
    return Frame(title, caption, tuple(_canvas(canvas, canvas, 0)))


def _step_frame(canvas: Sequence[Any], before: Sequence[Any], step: int, sure: int) -> Frame:
    """The call after a denoising step."""
    masked = sum(text is None for piece in canvas if not isinstance(piece, str) for text in piece.tokens)
    left = f"{_count(masked, 'position')} still masked" if masked else "nothing is masked any more"
    caption = f"The head fills in what it is surest of; {left}."
    if sure:
        caption = f"The head drafts what follows the base’s correction; {left}."
    return Frame(f"Step {step}", _words(caption), tuple(_canvas(canvas, before, sure)))


def _check_frame(data: dict[str, str], front: str, number: int) -> Frame:
    """What the base kept of a draft, and what it wrote instead of the rest."""
    spans = _broken(front, "sure") + _broken(data["accepted"], "accepted")
    if data["drafted"]:
        spans += [Span("drafted", _visible(data["drafted"])), *_broken(data["chosen"], "chosen")]
        spans += [Span("mask")] * 3
    return Frame(f"Check {number}", (Span("text", "The base "), *_verdict(data)), tuple(spans))


def _verdict(data: dict[str, str]) -> list[Span]:
    """What one forward of the base did, as the end of a sentence."""
    kept, drafted, chosen = (_visible(_plain(data[name])) for name in ("accepted", "drafted", "chosen"))
    if not kept and not drafted:
        return [Span("text", "wrote one token without a draft")]
    spans = [Span("text", "kept "), Span("accepted", kept) if kept else Span("text", "nothing")]
    if drafted:
        spans += [Span("text", ", replaced "), Span("drafted", drafted), Span("text", " by "), Span("chosen", chosen)]
    return spans


def _words(text: str) -> tuple[Span, ...]:
    return (Span("text", text),)


def _canvas(canvas: Sequence[Any], before: Sequence[Any], sure: int) -> list[Span]:
    """Spans of a canvas.

    Args:
        canvas: fixed texts and slots.
        before: the canvas one step earlier.
        sure: how many letters of the call the base has already settled.
    """
    spans, letters, index, closes = list[Span](), 0, 0, False
    while index < len(canvas):
        piece = canvas[index]
        if isinstance(piece, str):
            # The quote behind a string that is left out is left out too.
            piece, closes = piece[closes and piece.startswith('"') :], False
            letters += len(_letters(piece))
            spans += _broken(piece, "sure" if letters <= sure else "fixed", ends=index + 1 < len(canvas))
        elif piece.role == "presence" and piece.tokens == ("false",):
            end = _last_of(canvas, index)
            spans += _left_out(canvas[index + 1 : end])
            index, closes = end, True
            continue
        elif piece.role in ("value", "key"):
            earlier = before[index].tokens if index < len(before) and not isinstance(before[index], str) else ()
            for position, text in enumerate(piece.tokens):
                letters += len(_letters(text or ""))
                same = position < len(earlier) and earlier[position] == text
                spans += _token(text, same, letters <= sure)
            spans += [] if any(text != "" for text in piece.tokens) else [Span("chip", "empty")]
        else:
            spans += _decision(piece)
        index += 1
    return spans


def _token(text: str | None, same: bool, sure: bool) -> list[Span]:
    """One position of a value: masked, unused, or a token."""
    if text is None:
        return [Span("mask")]
    if not text:
        return []
    return [Span("sure" if sure else "kept" if same else "new", text)]


def _decision(piece: Any) -> list[Span]:
    """A slot that decides on the structure: whether a property is there, how many items, which variant."""
    decided = "".join(text or "" for text in piece.tokens)
    if any(text is None for text in piece.tokens):
        return [
            Span(
                "chip",
                "in or out?" if piece.role == "presence" else "how many?" if piece.role == "length" else "which?",
            )
        ]
    if piece.role == "presence" or not decided:
        return []
    return [Span("chip", f"{decided} ×" if piece.role == "length" else decided)]


def _left_out(pieces: Iterable[Any]) -> list[Span]:
    """A property that the draft leaves out: its name, faded."""
    texts = [piece for piece in pieces if isinstance(piece, str)]
    name = texts[0].rstrip('"[{: ') + '"' if texts else ""
    return [Span("absent", name), Span("chip", "left out")]


def _last_of(canvas: Sequence[Any], index: int) -> int:
    """Index behind the last slot of the property whose presence slot stands at `index`."""
    path = canvas[index].path
    own = [
        place
        for place in range(index, len(canvas))
        if not isinstance(canvas[place], str) and (canvas[place].path + "/").startswith(path + "/")
    ]
    return own[-1] + 1


def _broken(text: str, look: str, ends: bool = False) -> list[Span]:
    """Text with line breaks between properties; `ends`: also behind a comma at its end."""
    text = _BREAK.sub("\n  ", _plain(text))
    if ends and text.endswith(", "):
        text += "\n  "
    return [Span(look, text)] if text else []


def _plain(text: str) -> str:
    """Text of a reply without the line breaks and end token around its calls."""
    return text.replace("<|im_end|>", "").replace("<tool_call>\n", "").replace("\n</tool_call>", "").strip("\n")


def _visible(text: str) -> str:
    """Text whose spaces can be seen where there is nothing else."""
    return text if text.strip() else "␣" * len(text)


def _letters(text: str) -> str:
    """Text without structure and space: what a canvas and the text of a call have in common."""
    return _STRUCTURE.sub("", _plain(text))


def _call_starts(texts: Sequence[str]) -> list[int]:
    """Where each call begins in the joined texts."""
    starts, place = [], 0
    for text in texts:
        if text.startswith("<tool_call>"):
            starts.append(place)
        place += len(text)
    return starts


# --------------------------------------------------------------- HTML


def _section(title: str, body: str) -> str:
    return f'<section class="sd-card"><h2>{title}</h2>{body}</section>'


def _spans(spans: Iterable[Span]) -> str:
    """Spans as HTML; masks are blocks without text."""
    return "".join(
        '<i class="sd-mask" aria-hidden="true"></i>'
        if span.look == "mask"
        else f'<span class="sd-{span.look}">{escape(span.text)}</span>'
        for span in spans
    )


def _player(pictures: Sequence[Frame]) -> str:
    """All frames and the controls, which `page.js` brings to life."""
    shown = "".join(
        f'<li class="sd-frame"><p class="sd-caption"><b>{escape(frame.title)}</b> {_spans(frame.caption)}</p>'
        f'<div class="sd-canvas" tabindex="0" role="group" aria-label="{escape(frame.title)}">{_spans(frame.spans)}'
        "</div></li>"
        for frame in pictures
    )
    controls = (
        '<div class="sd-controls" hidden>'
        '<button type="button" data-do="back" aria-label="One frame back">‹</button>'
        '<button type="button" data-do="play">Play</button>'
        '<button type="button" data-do="on" aria-label="One frame on">›</button>'
        f'<input type="range" min="1" max="{len(pictures)}" value="{len(pictures)}" aria-label="Frame">'
        "<output></output></div>"
    )
    legend = "".join(
        f"<li>{_spans([sample])} {meaning}</li>"
        for sample, meaning in (
            (Span("mask"), "masked"),
            (Span("new", "new"), "drafted in this step"),
            (Span("kept", "kept"), "drafted before"),
            (Span("accepted", "kept"), "accepted by the base"),
            (Span("drafted", "no"), "replaced"),
            (Span("chosen", "yes"), "by this"),
        )
    )
    return (
        f'<div class="sd-player"><ol class="sd-stage">{shown}</ol>{controls}</div>'
        f'<ul class="sd-legend" aria-label="Legend">{legend}</ul>'
    )


def _route(answer: Answer) -> str:
    """Talk or call, how sure, and which tool."""
    calls = answer.message.get("tool_calls")
    route = next((event.data for event in answer.trace if event.kind == "route"), None)
    names = ", ".join(f"<code>{escape(call['function']['name'])}</code>" for call in calls or ())
    verdict = f"The base calls {names}" if calls else "The base talks"
    meter = ""
    if route is not None:
        probability = route["probability"]
        meter = (
            f'<p class="sd-meter"><span>P(call) = {probability:.3f}</span>'
            f'<meter min="0" max="1" value="{probability:.3f}" aria-label="Probability of a call"></meter></p>'
        )
    return _section("Route", f'<p class="sd-verdict">{verdict}</p>{meter}')


def _checks(checks: Iterable[dict[str, str]]) -> str:
    """What each forward of the base kept and replaced."""
    return f'<ol class="sd-checks">{"".join(f"<li>{_spans(_verdict(data))}</li>" for data in checks)}</ol>'


def _cut(paths: Sequence[str]) -> str:
    """A note on values that reached their limit."""
    return "".join(
        f'<p class="sd-note">{escape(path or "The call")} reached the limit of its length and was ended there.</p>'
        for path in paths
    )


def _cost(answer: Answer) -> str:
    """Forwards and time, beside those of the reference."""
    most = max(run.base_forwards for run in answer.runs)
    rows = "".join(_cost_row(run, most) for run in answer.runs)
    table = (
        '<table class="sd-cost"><thead><tr><th scope="col">decoding</th><th scope="col">base forwards</th>'
        f'<th scope="col">head forwards</th><th scope="col">time</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    if answer.same_tokens is None:
        return table
    same = "The same tokens as the base alone." if answer.same_tokens else "Other tokens than the base alone."
    look = "sd-same" if answer.same_tokens else "sd-other"
    return f'{table}<p class="{look}">{same}</p><p class="sd-note">Times of a repeat, on the machine of this page.</p>'


def _cost_row(run: Run, most: int) -> str:
    share = 100 * run.base_forwards / most if most else 0
    return (
        f'<tr><th scope="row">{DECODINGS[run.decoding]}</th>'
        f'<td>{run.base_forwards}<span class="sd-bar" style="width:{share:.0f}%"></span></td>'
        f"<td>{run.head_forwards}</td><td>{run.seconds * 1000:.0f} ms</td></tr>"
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
