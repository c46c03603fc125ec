"""One of the two processes that `test_trainer` starts, and the head stage that it runs there and alone."""

import os
import random
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from test_trainer import options, stage
from tiny_tokenizer import tiny_tokenizer, tiny_vocabulary
from training import head
from training.data import Row

CITIES = ("New York", "Rome", "a", "Lima", "Oslo and Bern")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


def request(rng: random.Random) -> Row:
    """A request of its own length, with one call."""
    city, days = rng.choice(CITIES), rng.randrange(1000)
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    prompt = list(tiny_vocabulary().encode(f"weather in {city}, {days}"))
    return Row(
        "r", "tiny", prompt, [], [tool], [{"name": "get_weather", "arguments": {"city": city, "days": days}}], []
    )


class Requests:
    """Stands in for the stream of rows."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def draw(self, style: Any, rng: random.Random) -> Row:
        """A request."""
        return request(rng)


def save_base(folder: Path) -> None:
    """Write a random base for the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    SmolLM3ForCausalLM(SmolLM3Config(vocab_size=len(tokenizer), **sizes, **heads, **ids)).save_pretrained(folder)


def train_head(base: Path, output: Path, patch: Any = setattr, **changes: Any) -> Any:
    """The head stage on requests made here. Of its evaluations the worst counts as the best, and that is the first:
    the run ends early and loads weights that are not its last.

    Args:
        base: from `save_base`.
        output: of the run.
        patch: sets an attribute.
        changes: of the options.

    Returns:
        The trained model.
    """
    rows = [request(random.Random(seed)) for seed in range(3)]
    patch(head, "RowStream", Requests)
    patch(head, "evaluation_sets", lambda *_: {"seen": rows})
    patch(head.HeadEvaluation, "best_metric", "seen_loss")
    run = head.HeadRun(
        **{
            "output": output,
            "base": str(base),
            "max_steps": 8,
            "rows_per_batch": 3,
            "noise_samples": 2,
            "own_draft_share": 0.5,
            "head_hidden_size": 32,
            "head_num_layers": 1,
            "head_num_heads": 2,
            "eval_steps": 2,
            "patience": 1,
            "logging_steps": 1,
            "acceptance_rows": 0,
            **changes,
        }
    )
    return head.train_head(run, tiny_tokenizer())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    stage(options(folder / "two", max_steps=4), batches=8).run()
    trained = train_head(folder / "base", folder / "two_head").diffusion_head.state_dict()
    save_file(trained, folder / f"head_of_{os.environ['RANK']}.safetensors")
