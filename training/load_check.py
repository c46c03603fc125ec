"""Loads a release as a stranger would, in a process of its own that knows nothing of this repository, and asks it once.

    python -P training/load_check.py RELEASE WEIGHTS...

Imports nothing of the repository. RELEASE is the folder to load, WEIGHTS are the files whose tensors it must have. The
last line of output is JSON: `{"checks": [sentence, ...]}`, or `{"error": sentence}` with exit status 1.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = {
    "name": "get_weather",
    "description": "Weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Name of the city", "maxLength": 40}},
        "required": ["city"],
    },
}
REQUEST = [{"role": "user", "content": "What is the weather in Lisbon?"}]


def check(release: Path, weights: Sequence[Path]) -> list[str]:
    """Load a release and see that it works.

    Args:
        release: folder to load.
        weights: files of the weights that it must have.

    Returns:
        What was checked, one sentence each.

    Raises:
        ValueError: something is not as it must be; the message says what. Loading raises errors of its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(release, trust_remote_code=False)
    for name in ("chat_template", "response_template"):
        if not getattr(tokenizer, name, None):
            raise ValueError(f"the tokenizer has no {name}: save it with build_tokenizer of tokenization_utils.py")
    model, info = AutoModelForCausalLM.from_pretrained(release, trust_remote_code=True, output_loading_info=True)
    faults = {name: sorted(map(str, found)) for name, found in info.items() if found and name.endswith("_keys")}
    if faults:
        name, keys = next(iter(faults.items()))
        raise ValueError(f"the weights do not fit the config: {name} are {', '.join(keys[:3])} ({len(keys)} in all)")
    return [
        "tokenizer: loads without remote code, with chat and response templates",
        f"model: {type(model).__name__} loads with trust_remote_code",
        same_weights(model.state_dict(), weights),
        answer(model, tokenizer),
    ]


def same_weights(loaded: Mapping[str, Tensor], weights: Sequence[Path]) -> str:
    """See that a model has the weights of files, by their hash.

    Args:
        loaded: tensors of the model.
        weights: the files.

    Raises:
        ValueError: a tensor is missing or differs.
    """
    of_files, of_model, count = hashlib.sha256(), hashlib.sha256(), 0
    for name, tensor in saved_tensors(weights):
        if name not in loaded:
            raise ValueError(f"the loaded model has no {name}, which the files to be released hold")
        for digest, one in ((of_files, tensor.to(loaded[name].dtype)), (of_model, loaded[name])):
            digest.update(name.encode())
            digest.update(one.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        if of_files.digest() != of_model.digest():
            raise ValueError(f"{name} differs from what is released: the base has other weights, or a file is damaged")
        count += 1
    return f"weights: {count} tensors equal those released, SHA-256 {of_model.hexdigest()[:16]}"


def saved_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of files, in order."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def answer(model: Any, tokenizer: Any) -> str:
    """Let a model make one call, through the chat template, `generate` and the response template.

    A plain base, which has no head, writes a few tokens instead.

    Raises:
        ValueError: what it wrote is no call of the tool.
    """
    has_head = hasattr(model, "diffusion_head")
    tools = {"tools": [TOOL]} if has_head else {}
    inputs = tokenizer.apply_chat_template(
        REQUEST, add_generation_prompt=True, return_dict=True, return_tensors="pt", **tools
    )
    prompt = tokenizer.decode(inputs["input_ids"][0])
    if not has_head:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return "answer: a plain base, which writes on"
    ids = model.generate(**inputs, tokenizer=tokenizer, tool_choice="required", max_tool_calls=1, **tools)
    message = tokenizer.parse_response(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]), prefix=prompt)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    if [call["name"] for call in calls] != [TOOL["name"]] or list(calls[0]["arguments"]) != ["city"]:
        raise ValueError(f"a request for a call of {TOOL['name']} was answered by {message}")
    return f"answer: one call, {json.dumps(calls[0], ensure_ascii=False)}"


def main(arguments: list[str]) -> int:
    """Print the result; returns the exit status."""
    release, *weights = map(Path, arguments)
    try:
        checks = check(release, weights)
    except Exception as error:  # whatever goes wrong is the result
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}))
        return 1
    print(json.dumps({"checks": checks}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
