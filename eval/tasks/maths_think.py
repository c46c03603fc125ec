"""The problems and the scoring of the task `maths_think`: grade-school maths, exact match of the last number.

The problems are those that training holds out (`training.data.held_out_problems`), so the two cannot disagree.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets

from repo_package import load_repo_module
from training.data import DEFAULT_DATA, PROBLEMS, held_out_problems

tokenization = load_repo_module("tokenization_utils")

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def problems(data: str | Path = DEFAULT_DATA, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """The held-out problems in the order of a hash of their ids, so that a smaller limit takes the first of them.

    Args:
        data: folder with `text/`.

    Returns:
        The split `test`, columns `id`, `question` and `answer`.

    Raises:
        FileNotFoundError: the folder does not hold the problems.
    """
    records = held_out_problems(Path(data))
    if not records:
        path = Path(data, f"{PROBLEMS}.jsonl.gz")
        raise FileNotFoundError(f"{path} is missing: name the folder that holds {PROBLEMS}.jsonl.gz with --data.")
    rows = [
        {"id": record["id"], "question": record["messages"][-1]["content"], "answer": record["answer"]}
        for record in records
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def final_number(reply: str) -> Decimal | None:
    """The last number behind the thought; None where there is none, or where the thought never ends.

    Args:
        reply: with its thought or without.
    """
    answer = reply.rpartition(tokenization.THINK_END_TOKEN)[2]
    if tokenization.THINK_TOKEN in answer:
        return None  # numbers of an unfinished thought are no answer
    found = _NUMBER.findall(answer)
    return Decimal(found[-1].replace(",", "")) if found else None


def score(problem: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
    """Score one reply.

    Args:
        problem: a row of `problems`.
        replies: one reply.

    Returns:
        `exact_match`: the reply's last number is the gold one, as a number; `answered`: it has one at all.
    """
    number = final_number(replies[0])
    return {"exact_match": float(number == final_number(problem["answer"])), "answered": float(number is not None)}
