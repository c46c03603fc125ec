"""The moving picture of the README: one call from its request to the JSON: `python -m eval.animation`.

Asks the model one fixed request, draws what its trace says (route, masked slots, denoising steps, what the base keeps
of the draft and what it replaces, the call) and counts forwards, in the end beside those of the base without drafts.
Nothing is staged: another model gives another picture. What the frames say stands as text in the GIF's comment.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import WEATHER, first_canvas
from eval.widget import BOOKING
from repo_package import ROOT

REQUEST = "book a table at Olive Garden for 4 people"
# The values of the tool that is meant are all required, so that a canvas without its masks is the call's text.
TOOLS: list[dict[str, Any]] = [BOOKING, WEATHER]
END = "\n</tool_call>"

ASK_MS, ROUTE_MS, STEP_MS, CHECK_MS, CALL_MS = 800, 1000, 600, 1500, 2200


@dataclass(frozen=True)
class Cell:
    """One character of a scene.

    Args:
        text: the character; a line break ends the line.
        style: key of `COLOURS`.
        written: whether it is part of the call; line breaks and indents are not, nor masks and NULLs.
    """

    text: str
    style: str
    written: bool = True


@dataclass(frozen=True)
class Scene:
    """What is seen at a time.

    Args:
        title: the stage.
        note: what happens, as texts and their styles.
        cells: the call as far as it is drafted.
        base, head: forwards so far.
        reference: forwards of the base without drafts; None before the end.
        ms: how long it is shown.
    """

    title: str
    note: Sequence[tuple[str, str]]
    cells: Sequence[Cell]
    base: int
    head: int
    reference: int | None
    ms: int


@dataclass(frozen=True)
class Run:
    """A request that was answered.

    Args:
        reply: of `respond`, with its trace.
        reference: forwards of the base without drafts for the same tokens.
        parameters: of the model.
    """

    reply: Any
    reference: int
    parameters: int


# ---------------------------------------------------------------------------------------------------------------------
# What is seen
# ---------------------------------------------------------------------------------------------------------------------


def record(model: Any, tokenizer: Any) -> Run:
    """Ask the request, with drafts of the head and without drafts.

    Raises:
        ValueError: the model does not call, or the two replies differ.
    """
    asked: dict[str, Any] = {"tools": TOOLS, "tokenizer": tokenizer}
    messages = [{"role": "user", "content": REQUEST}]
    reply = model.respond(messages, **asked, decoding="verified", drafter="head", output_trace=True)
    alone = model.respond(messages, **asked, decoding="ar")
    if reply.mode != "tool":
        raise ValueError(f"the model answers {REQUEST!r} without a call, so there is nothing to show of it.")
    if reply.token_ids != alone.token_ids:
        raise ValueError("the replies with and without drafts differ, which they must not: this is no run to show.")
    return Run(reply, alone.stats.base_forwards, sum(parameter.numel() for parameter in model.parameters()))


def cells_of(canvas: Sequence[Any]) -> list[Cell]:
    """A canvas as characters, a line for each argument.

    Args:
        canvas: of a `draft` event: fixed texts and `SlotView`s.
    """
    cells: list[Cell] = []
    for piece in canvas:
        if isinstance(piece, str):
            cells += _fixed(piece)
            continue
        for token in piece.tokens:
            if token is None:
                cells.append(Cell("█", "mask", written=False))
            elif token:
                cells += [Cell(character, "value") for character in token]
            else:
                cells.append(Cell("·", "null", written=False))
    return cells


def _fixed(text: str) -> Iterator[Cell]:
    """Fixed text of a canvas: a new line behind the opening of the arguments and between them."""
    opening, brace, rest = text.strip("\n").partition('"arguments": {')
    if not brace:
        opening, rest = "", opening
    lines = rest.replace(", ", ", \n").split("\n")
    for number, line in enumerate([opening + brace, *lines] if brace else lines):
        if number:
            yield Cell("\n", "fixed", written=False)
            yield from (Cell(" ", "fixed", written=False) for _ in range(2))
        yield from (Cell(character, "fixed") for character in line)


def checked(cells: Sequence[Cell], known: int, event: Any) -> tuple[list[Cell], int]:
    """A finished draft with what the base keeps of it, replaces and drops.

    Args:
        cells: the draft.
        known: how many characters of the call were settled before, but for text that the grammar forces behind them.
        event: of kind `verify`.

    Returns:
        The cells in other styles, and how many characters are settled now.

    Raises:
        ValueError: the draft is not what the event speaks of.
    """
    kept, drafted = event.data["accepted"], event.data["drafted"]
    text = "".join(cell.text for cell in cells if cell.written)
    start = (text + END).find(kept + drafted, known)
    if start < 0:
        raise ValueError(f"the base was asked of {kept + drafted!r}, which is not in the draft {text!r}.")
    ends = [(start, "fixed"), (start + len(kept), "kept"), (start + len(kept) + len(drafted), "replaced")]
    made, place = [], 0
    for cell in cells:
        style = next((style for end, style in ends if place < end), "dropped" if drafted else "fixed")
        made.append(replace(cell, style=style) if cell.written else cell)
        place += cell.written
    return made, start + len(kept) + len(event.data["chosen"])


def _visible(text: str) -> str:
    """Text of a note: blanks can be seen."""
    return text.removesuffix(END).replace("\n", "↵") if text.strip() else text.replace(" ", "␣").replace("\n", "↵")


def _progress(step: int, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What a denoising step did, as a note."""
    masks = sum(cell.style == "mask" for cell in cells)
    left = f"what is sure stays, {masks} tokens are still masked" if masks else "all filled in; · stands for no token"
    return [(f"step {step}: {left}", "plain")]


def _verdict(event: Any) -> list[tuple[str, str]]:
    """What a check said, as a note."""
    kept, drafted, chosen = (_visible(event.data[name]) for name in ("accepted", "drafted", "chosen"))
    if not drafted:
        return [("the base keeps all of it", "kept")]
    note = [("the base keeps ", "plain"), (kept, "kept"), (", ", "plain")] if kept else []
    return [*note, ("replaces ", "plain"), (drafted, "replaced"), (" by ", "plain"), (chosen, "chosen")]


def scenes(run: Run) -> list[Scene]:
    """The scenes of a run, in the order of its trace.

    Args:
        run: of `record`.
    """
    stats, call = run.reply.stats, run.reply.message["tool_calls"][0]["function"]
    made = [Scene("asked", [("which tool, and with which values?", "plain")], [], 0, 0, None, ASK_MS)]
    base, head, step, known = 0, 0, 0, 0
    cells: list[Cell] = []
    for event in run.reply.trace:
        if event.kind == "route":
            base += 1
            note = [("P(call) = ", "plain"), (f"{event.data['probability']:.3f}", "kept")]
            note += [(", so it calls ", "plain"), (call["name"], "value"), ("; its schema gives the JSON", "plain")]
        elif event.kind == "draft":
            if made[-1].title == "asked":
                masked = cells_of(first_canvas(event.data["canvas"]))
                made.append(Scene("base: route", note, masked, base, head, None, ROUTE_MS))
            head, step = head + 1, step + 1
            cells = cells_of(event.data["canvas"])
            made.append(Scene("head: denoise", _progress(step, cells), cells, base, head, None, STEP_MS))
        else:
            base += 1
            if step and (event.data["accepted"] or event.data["drafted"]):
                shown, known = checked([cell for cell in cells if cell.style != "null"], known, event)
                made.append(Scene("base: check", _verdict(event), shown, base, head, None, CHECK_MS))
            step = 0
    written = json.dumps({name: call[name] for name in ("name", "arguments")}, ensure_ascii=False)
    final = [replace(cell, style="plain") for cell in _fixed(written)]
    words = f"{stats.base_forwards} forwards of the base; without drafts the same tokens take {run.reference}"
    counts = stats.base_forwards, stats.head_forwards, run.reference
    return [*made, Scene("call", [(words, "plain")], final, *counts, CALL_MS)]


def description(shown: Sequence[Scene]) -> str:
    """The scenes as text, which also stands in the picture's comment: a line for the stage, then the call."""
    lines = []
    for scene in shown:
        counts = f"base {scene.base}, head {scene.head}"
        counts += "" if scene.reference is None else f", without drafts {scene.reference}"
        note = "".join(text for text, _ in scene.note)
        lines += [f"{scene.title} ({counts}): {note}", *"".join(cell.text for cell in scene.cells).splitlines()]
    return "\n".join([f"request: {REQUEST}", *lines]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 800, 336
SCALE = 2
"""Drawn at twice the size at which it is shown, for screens with small pixels."""
MARGIN, LINE, LABEL = 24, 26, 200
SMALL, PLAIN, LARGE = 12, 15, 18
"""Of letters."""
BACKGROUND, BEHIND, BORDER = "#0d1117", "#67060c", "#6e7681"
COLOURS = {
    "plain": "#e6edf3",
    "label": "#9da7b3",
    "fixed": "#9da7b3",
    "value": "#79c0ff",
    "mask": "#1f4b7a",
    "null": "#6e7681",
    "kept": "#56d364",
    "replaced": "#ff7b72",
    "dropped": "#6e7681",
    "chosen": "#e3b341",
    "base": "#58a6ff",
    "head": "#39c5cf",
    "alone": "#f0883e",
}
PALETTE = 64


class _Pen:
    """Writes on a picture in characters of one width.

    Args:
        image: RGB, `SCALE` times as large as the places that are given.
    """

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)
        fonts = Path(get_data_path()) / "fonts" / "ttf"
        self.fonts = {
            size: ImageFont.truetype(fonts / "DejaVuSansMono.ttf", size * SCALE, layout_engine=ImageFont.Layout.BASIC)
            for size in (SMALL, PLAIN, LARGE)
        }

    def width(self, size: int) -> float:
        """Of a character."""
        return self.fonts[size].getlength("0") / SCALE

    def write(self, x: float, y: float, text: str, style: str, size: int = PLAIN) -> float:
        """Write a text that begins at x and whose line begins at y; gives where it ends."""
        end, middle = x + self.width(size) * len(text), y + size * 0.62
        if style == "mask":
            self.box(x + 1, y + 2, end - 1, y + size + 3, COLOURS[style])
            return end
        if style == "replaced":
            self.box(x, y, end, y + size + 4, BEHIND)
        self.draw.text((x * SCALE, y * SCALE), text, COLOURS[style], self.fonts[size])
        if style == "dropped":
            self.box(x, middle, end, middle + 1.5, COLOURS[style])
        return end

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """Fill a rectangle."""
        self.draw.rectangle([round(place * SCALE) for place in (left, top, right, bottom)], fill=colour)


def frame(scene: Scene, run: Run) -> Image.Image:
    """A scene as a picture, RGB, `SCALE` times `WIDTH` x `HEIGHT`."""
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), BACKGROUND)
    pen = _Pen(image)
    edge = WIDTH * SCALE - 1, HEIGHT * SCALE - 1
    pen.draw.rectangle([(0, 0), edge], outline=BORDER, width=SCALE)
    pen.write(pen.write(MARGIN, 16, "request  ", "label"), 16, REQUEST, "plain")
    tools = "  ".join(f"{tool['function']['name']}({', '.join(_names(tool))})" for tool in TOOLS)
    pen.write(pen.write(MARGIN, 40, "tools    ", "label"), 40, tools, "label")
    _stage(pen, scene)
    _counts(pen, scene)
    made = f"a recorded run of a model with {run.parameters / 1e6:.0f}M parameters: python -m eval.animation"
    pen.write(MARGIN, HEIGHT - 24, made, "label", SMALL)
    return image


def _names(tool: Any) -> list[str]:
    return list(tool["function"]["parameters"]["properties"])


def _stage(pen: _Pen, scene: Scene) -> None:
    """What happens, and the call as far as it is."""
    pen.box(MARGIN, 68, WIDTH - MARGIN, 69, BORDER)
    x = pen.write(MARGIN, 80, f"{scene.title}  ", "chosen")
    for text, style in scene.note:
        x = pen.write(x, 80, text, style)
    x, y = MARGIN, 114
    for cell, behind in zip(scene.cells, [*scene.cells[1:], Cell("\n", "fixed")], strict=False):
        if cell.text == "\n":
            x, y = MARGIN, y + LINE
        elif cell.text != " " or behind.text != "\n":
            x = pen.write(x, y, cell.text, cell.style, LARGE)


def _counts(pen: _Pen, scene: Scene) -> None:
    """Forwards so far, a box each."""
    top = HEIGHT - 116
    pen.box(MARGIN, top - 8, WIDTH - MARGIN, top - 7, BORDER)
    rows = [("forwards of the base", scene.base, "base"), ("passes of the head", scene.head, "head")]
    if scene.reference is not None:
        rows.append(("base without drafts", scene.reference, "alone"))
    for number, (words, count, style) in enumerate(rows):
        y = top + number * 26
        pen.write(MARGIN, y, words, "label")
        x = float(MARGIN + LABEL)
        for _ in range(count):
            pen.box(x, y + 2, x + 26, y + 18, COLOURS[style])
            x += 32
        pen.write(x + 4, y, str(count), "plain")


def save(run: Run, out: Path) -> None:
    """Draw a run and write it as a GIF that begins again at its end; the same run gives the same bytes.

    Args:
        run: of `record`.
        out: the file.
    """
    shown = scenes(run)
    frames = [frame(scene, run) for scene in shown]
    # One palette for all, so that nothing flickers.
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for number, picture in enumerate(frames):
        strip.paste(picture, (0, number * picture.height))
    strip = strip.quantize(PALETTE, dither=Image.Dither.NONE)
    boxes = [(0, number * one.height, one.width, (number + 1) * one.height) for number, one in enumerate(frames)]
    first, *rest = [strip.crop(box) for box in boxes]
    out.parent.mkdir(parents=True, exist_ok=True)
    first.save(
        out,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[scene.ms for scene in shown],
        loop=0,
        comment=description(shown).encode(),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.animation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT), help="folder or repo of the model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "denoising.gif", help="the picture")
    options = parser.parse_args(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True, dtype=torch.float32).eval()
        run = record(model, tokenizer)
        save(run, options.out)
    except (OSError, ValueError) as error:
        sys.exit(f"eval.animation: {error}")
    print(description(scenes(run)), end="")
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
