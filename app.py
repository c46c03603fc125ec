"""The Space: a page that shows how a request becomes a tool call, and what that costs beside the base alone.

Takes requests and tools that visitors type; gives the route, the denoising as a picture that moves, what the base
checked, the call and its cost. `python app.py [--model FOLDER_OR_REPO] [--host 127.0.0.1] [--port 7860]`
"""

import argparse
import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

import json
import logging
import time
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from demo import REQUESTS
from space import rendering
from space.asking import Options, ask
from space.tools import read_tools, signature

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = os.environ.get("MODEL_ID") or str(ROOT)
MAX_WAITING = 20

PYTHON_TOOLS = '''\
from typing import Literal


def book_table(restaurant: str, people: int, time: str | None = None):
    """
    Book a table at a restaurant.

    Args:
        restaurant: Name of the restaurant
        people: Number of people
        time: Time of the reservation
    """


def turn_on_light(room: Literal["kitchen", "bedroom", "living room"]):
    """
    Turn on the light in a room.

    Args:
        room: The room
    """
'''

HEADER = """
<header class="sd-header">
<h1>Tool calls by denoising</h1>
<p>Type a request and see how it becomes a tool call. A small diffusion head drafts all values at once, the language
model checks them. Every call fits its tool’s schema; whether it is the right one is up to the model, and a small one
is often wrong.</p>
</header>
"""
TOOLS_HINT = "A JSON list, or Python functions with type hints and a docstring (read, never run). Ctrl + Enter asks."
DRAFTERS = {"head": "Diffusion head", "lookup": "Look-up in the request", "mixed": "Look-up, then the head"}
POLICIES = ("confidence", "entropy", "margin", "threshold", "contiguous", "entropy_bounded", "random")
SCRIPT = (ROOT / "space" / "page.js").read_text(encoding="utf-8")
# Fonts of the visitor's system: the page asks no other site for anything.
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
).set(
    # Enough contrast for small text.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)

logger = logging.getLogger(__name__)


def as_text(tools: list[dict[str, Any]]) -> str:
    """Tools as a visitor may edit them: without the OpenAI wrapping, indented."""
    return json.dumps([tool["function"] for tool in tools], ensure_ascii=False, indent=2)


# What a button says, the request and the tools.
EXAMPLES = [
    *((text, text, as_text(tools)) for _, text, tools in REQUESTS),
    ("turn on the light in the kitchen (Python functions)", "turn on the light in the kitchen", PYTHON_TOOLS),
]


@cache
def load(source: str) -> tuple[Any, Any]:
    """Model and tokenizer, loaded once.

    Args:
        source: folder or repo.

    Returns:
        The model, on a GPU where there is one, and its tokenizer.

    Raises:
        OSError: there is no model.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    on_gpu = torch.cuda.is_available()
    # On a CPU float32 is the fastest, and the reference writes exactly the same tokens.
    model = AutoModelForCausalLM.from_pretrained(
        source, trust_remote_code=True, dtype="auto" if on_gpu else torch.float32
    )
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


def answer(
    source: str, request: str, tools: str, decoding: str, drafter: str, steps: float, remasking: str
) -> tuple[str, str]:
    """Answer a visitor.

    Args:
        source: folder or repo of the model.
        request: what was typed.
        tools: the text of the tools.
        decoding, drafter, steps, remasking: see `Options`.

    Returns:
        HTML of the result, and one sentence on it for those who hear the page. What cannot be done is said there too;
        nothing is raised.
    """
    try:
        options = Options(decoding, drafter, int(steps), remasking)
        result = ask(*load(source), request, read_tools(tools), options)
        return rendering.answer_html(result), escape(rendering.summary(result))
    except (ValueError, TimeoutError) as error:
        message = str(error)
    except Exception:
        logger.exception("A request failed.")  # says where, and nothing of what the visitor typed
        message = "Something went wrong on this side; the request was not answered. Please try another one."
    return rendering.alert(message), escape(message)


def tools_status(text: str) -> str:
    """HTML of one line on the tools typed so far: what can be called, or why they cannot be read."""
    try:
        tools = read_tools(text)
    except ValueError as error:
        return f'<p class="sd-bad">{escape(str(error))}</p>'
    shown = ", ".join(map(signature, tools)) if tools else "No tools: the model can only talk."
    return f'<p class="sd-good">{escape(shown)}</p>'


def build_page(source: str) -> gr.Blocks:
    """The page; the model is loaded with the first request.

    Args:
        source: folder or repo of the model.
    """

    def respond(*values: Any) -> tuple[str, str]:
        return answer(source, *values)

    with gr.Blocks(title="Tool calls by denoising", analytics_enabled=False) as page:
        gr.HTML(HEADER, elem_classes="sd-head", apply_default_css=False)
        with gr.Row(elem_classes="sd-columns"):
            with gr.Column(scale=5, min_width=300):
                _, first, its_tools = EXAMPLES[0]
                # With one line to begin with, Enter asks; a longer request still grows the field.
                request = gr.Textbox(first, label="Request", lines=1, max_lines=6, placeholder="What do you want?")
                button = gr.Button("Ask", variant="primary", elem_id="sd-ask")
                with gr.Group(elem_classes="sd-examples"):
                    examples = [gr.Button(title, size="sm") for title, _, _ in EXAMPLES]
                tools = gr.Textbox(
                    its_tools, label="Tools", info=TOOLS_HINT, lines=12, max_lines=12, elem_classes="sd-tools"
                )
                status = gr.HTML(tools_status(its_tools), elem_id="sd-tools-status", apply_default_css=False)
                choices = _choices()
            with gr.Column(scale=7, min_width=300):
                result = gr.HTML(rendering.welcome(), elem_id="sd-result", js_on_load=SCRIPT, apply_default_css=False)
                heard = gr.HTML("", elem_id="sd-status")
        inputs, outputs = [request, tools, *choices], [result, heard]
        asked: dict[str, Any] = {
            "show_progress_on": result,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        gr.on([button.click, request.submit], respond, inputs, outputs, **asked)
        for example, (_, *values) in zip(examples, EXAMPLES, strict=True):
            # Filled in by the browser, so that nothing flickers.
            filled = example.click(None, None, [request, tools], js=f"() => {json.dumps(values)}")
            filled.then(respond, inputs, outputs, **asked)
        tools.change(
            tools_status, tools, status, show_progress="hidden", trigger_mode="always_last", api_visibility="private"
        )
    return page.queue(max_size=MAX_WAITING)


def _choices() -> list[gr.components.Component]:
    """The options of decoding, in the order of `Options`."""
    default = Options()
    with gr.Accordion("Options of decoding", open=False, elem_classes="sd-options"):
        return [
            gr.Radio(_choice(rendering.DECODINGS), value=default.decoding, label="Decoding"),
            gr.Radio(_choice(DRAFTERS), value=default.drafter, label="Who drafts"),
            gr.Slider(1, 8, value=default.steps, step=1, label="Denoising steps, at most", buttons=[]),
            gr.Dropdown(
                list(POLICIES),
                value=default.remasking,
                label="Remasking policy",
                info="Which drafted tokens stand after a step.",
                filterable=False,
            ),
        ]


def _choice(names: dict[str, str]) -> list[tuple[str, str]]:
    """Names to choose from, as gradio wants them: what is shown first."""
    return [(shown, name) for name, shown in names.items()]


demo = build_page(DEFAULT_MODEL)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or repo (default: MODEL_ID, else this folder)")
    # A Space sets these variables, so that the page can be reached from outside its container.
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    parser.add_argument("--host", default=host, help=f"address to listen at (default: {host})")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    parser.add_argument("--port", type=int, default=port, help=f"port to listen at (default: {port})")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        model, _ = load(options.model)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"There is no model at {options.model!r}: name one by --model or MODEL_ID. ({error})"
        ) from None
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"model with {size:.1f}M parameters loaded in {time.perf_counter() - start:.1f} s", flush=True)
    page = demo if options.model == DEFAULT_MODEL else build_page(options.model)
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            footer_links=[],
            run_history=False,
            max_file_size="1mb",
            ssr_mode=False,
            theme=THEME,
            css_paths=ROOT / "space" / "page.css",
        )
    except OSError as error:
        raise SystemExit(f"The page cannot listen at {options.host}, port {options.port}: {error}") from None


if __name__ == "__main__":
    main()
