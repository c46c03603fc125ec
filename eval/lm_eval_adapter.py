"""This model under the lm-evaluation-harness: `python -m eval.lm_eval_adapter --tasks maths_think --limit 20`.

Importing this module registers the model class `smollm_diffusion` with the harness, which is optional: `pip install
"lm_eval[hf]"`. The command runs tasks of the harness and those in eval/tasks with the chat template, greedily unless a
task asks otherwise, and goes on where an interrupted run stopped. eval/tasks/README.md has the commands for GSM8K,
MMLU, IFEval and MT-Bench.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

try:
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.api.model import hash_args  # type: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
except ImportError as error:
    missing = f'eval.lm_eval_adapter needs the lm-evaluation-harness ({error}): pip install "lm_eval[hf]"'
    if __name__ == "__main__":
        sys.exit(missing)
    raise ImportError(missing) from error

import torch

from eval.devices import device_name
from eval.resumable import PartialResults, evaluation_parser, versions
from repo_package import ROOT, load_repo_module

tokenization = load_repo_module("tokenization_utils")

TASKS = ROOT / "eval" / "tasks"


@register_model("smollm_diffusion")
class SmolLMDiffusionLM(HFLM):
    """The harness's model class for transformers, with what this model needs.

    Its code is trusted, the length of a reply is what the task asks for and not the model's own default, thoughts end
    with `</think>`, and tools that a prompt shows are known.

    Args:
        pretrained: folder or repo of the model.
        device: where it runs; None = a GPU if there is one.
        think_end_token: what a thought ends with; the harness scores what stands behind it.
        options: of `HFLM`, such as `dtype`, `batch_size` and `enable_thinking`.
    """

    def __init__(
        self,
        pretrained: str = str(ROOT),
        device: str | None = None,
        think_end_token: str | None = tokenization.THINK_END_TOKEN,
        **options: Any,
    ) -> None:
        super().__init__(
            pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            think_end_token=think_end_token,
            **{**options, "trust_remote_code": True},
        )
        # It would win over the `max_length` by which the harness says how long a reply may be.
        self.model.generation_config.max_new_tokens = None
        self._kept: PartialResults | None = None

    def keep_in(self, store: PartialResults) -> None:
        """Keep every result in a store, and take from it what it holds."""
        self._kept = store
        self.set_cache_hook(_Keeper(store))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Replies, in the order of the requests."""
        return self._resumed("generate_until", super().generate_until, requests, disable_tqdm)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """(log-likelihood, whether greedy decoding writes it) of continuations, in the order of the requests."""
        return self._resumed("loglikelihood", super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of texts, in the order of the requests."""
        return self._resumed("loglikelihood_rolling", super().loglikelihood_rolling, requests, disable_tqdm)

    def _resumed(
        self, name: str, run: Callable[..., list[Any]], requests: Sequence[Any], disable_tqdm: bool
    ) -> list[Any]:
        """Run the requests that the store does not hold; replies that are drawn are never taken from it."""
        store = self._kept
        if store is None:
            return run(list(requests), disable_tqdm=disable_tqdm)
        keys = ["" if _is_drawn(request.args) else hash_args(name, request.args) for request in requests]
        todo = [index for index, key in enumerate(keys) if key not in store]
        new = run([requests[index] for index in todo], disable_tqdm=disable_tqdm) if todo else []
        found = dict(zip(todo, new, strict=True))
        return [found[index] if index in found else _result(store[key]) for index, key in enumerate(keys)]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        return super()._model_generate(context, max_length, stop, tokenizer=self.tokenizer, **options)


class _Keeper:
    """What the harness hands each result to as soon as it is known.

    Args:
        store: where it is kept.
    """

    def __init__(self, store: PartialResults) -> None:
        self.store = store

    def add_partial(self, name: str, args: Sequence[Any], result: Any) -> None:
        """Keep a result."""
        if not _is_drawn(args):
            self.store.put(hash_args(name, args), result)


def _is_drawn(args: Sequence[Any]) -> bool:
    """Whether a request asks for a reply that is drawn."""
    return len(args) > 1 and isinstance(args[1], dict) and bool(args[1].get("do_sample"))


def _result(kept: Any) -> Any:
    """A result as the harness had it; JSON has no tuples."""
    return tuple(kept) if isinstance(kept, list) else kept


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = evaluation_parser("lm_eval_adapter", __doc__, limit=50)
    parser.add_argument("--tasks", nargs="+", default=["maths_think"], help="of the harness, or of eval/tasks")
    parser.add_argument("--think", action=argparse.BooleanOptionalAction, default=True, help="ask in think mode")
    parser.add_argument(
        "--fewshot", type=int, default=None, help="worked examples in a prompt; None = as the task says"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    if options.limit < 0 or options.batch_size < 1:
        parser.error("--limit must be 0 or more, --batch-size at least 1")
    return options


def evaluate(options: argparse.Namespace, store: PartialResults) -> dict[str, Any]:
    """Run the tasks.

    Args:
        options: of `parse`.
        store: keeps replies and likelihoods.

    Returns:
        By task: `documents`, `note` where it has one, and its metrics with standard errors as the harness names them.

    Raises:
        ValueError: a task is unknown.
    """
    # The harness reads thousands of files to know its own tasks.
    ours = {path.stem for path in TASKS.glob("*.yaml")}
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=not ours.issuperset(options.tasks),
        metadata={"data": str(options.data)},
    )
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"There is no task {', '.join(unknown)}: `lm_eval ls tasks` lists those of the harness, {TASKS} holds ours."
        )
    model = SmolLMDiffusionLM(
        options.model,
        device=options.device,
        dtype=options.dtype,
        batch_size=options.batch_size,
        enable_thinking=options.think,
    )
    model.keep_in(store)
    found = lm_eval.simple_evaluate(
        model,
        tasks=options.tasks,
        num_fewshot=options.fewshot,
        limit=options.limit or None,
        apply_chat_template=True,
        task_manager=manager,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    assert found is not None  # that is what other processes of a distributed run get
    return {name: _of_task(name, metrics, found) for name, metrics in found["results"].items()}


def _of_task(name: str, metrics: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What the harness found for one task or group."""
    documents = found["n-samples"].get(name, {}).get("effective")
    note = (found["configs"].get(name, {}).get("metadata") or {}).get("note")
    numbers = {key: value for key, value in metrics.items() if "," in key and isinstance(value, int | float)}
    return {"documents": documents, **({"note": note} if note else {}), "metrics": numbers}


def table(results: dict[str, Any]) -> str:
    """The results as text: one metric a line, notes below."""
    lines = [f"{'task':<32}{'documents':>10}  {'metric':<36}{'value':>10}{'+-':>10}"]
    for name, result in results.items():
        metrics = result["metrics"]
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                shown = "" if error is None else f"{error:.4f}"
                count = "" if result["documents"] is None else result["documents"]
                lines.append(f"{name:<32}{count:>10}  {key:<36}{value:>10.4f}{shown:>10}")
    notes = [f"{name}: {result['note']}" for name, result in results.items() if "note" in result]
    return "\n".join([*lines, *notes])


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Evaluate, print and write the result.

    Args:
        options: of `parse`.
        command: as it was typed, for the result.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    store = PartialResults(options.out, {name: value for name, value in vars(options).items() if name != "out"})
    start = time.perf_counter()
    known = len(store)
    try:
        with store.kept_when_interrupted():
            results = evaluate(options, store)
    except (OSError, ValueError):
        if not len(store):  # another --model or --tasks may follow
            store.path.unlink()
        raise
    report = {
        "command": command,
        "versions": versions() | {"lm_eval": lm_eval.__version__},
        "threads": torch.get_num_threads(),
        "device": device_name(torch.device(options.device)),
        "dtype": options.dtype,
        "think": options.think,
        "seconds": round(time.perf_counter() - start, 1),
        "taken_from_an_interrupted_run": known,
        "tasks": results,
    }
    print(table(results))
    store.finish(report)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    typed = sys.argv[1:] if arguments is None else arguments
    try:
        run(parse(arguments), shlex.join(["python", "-m", "eval.lm_eval_adapter", *typed]))
    except (OSError, ValueError) as error:
        sys.exit(f"eval.lm_eval_adapter: {error}")


if __name__ == "__main__":
    main()
