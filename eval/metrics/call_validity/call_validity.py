"""Whether replies can be used at all: JSON that parses, tools that exist, arguments that fit their schema.

Takes the calls of replies as JSON and the tools that were offered; says nothing of whether the calls are right.
"""

import json
from collections import Counter
from typing import Any

import datasets
import evaluate
import jsonschema
import referencing
import referencing.exceptions

_DESCRIPTION = """
Share of replies that parse and whose every call names a tool that was offered, with arguments that are valid against
its JSON Schema (Draft 2020-12); and how often which of it fails.
"""

_CITATION = """
Defined in this repository. JSON: RFC 8259, with distinct names in an object. Validity: JSON Schema draft 2020-12, by
the jsonschema library; `format` is not checked.
"""

_INPUTS = """
Args:
    predictions: for each reply its calls as a JSON text, [{"name": ..., "arguments": {...}}, ...]; [] where nothing is
        called.
    tools: for each reply the tools that were offered as a JSON text, a list in OpenAI style.

Returns:
    requests: how many.
    valid: share of replies without any fault; a reply that calls nothing has none.
    parsed: share of replies that are a JSON list of calls.
    calls: calls in the replies that parse.
    schema_valid: share of these calls whose tool is known and whose arguments are valid.
    unknown_names: calls of tools that were not offered.
    missing_required: calls that lack a required property at any depth.
    A rate over nothing is None.

Examples:
    >>> import json
    >>> import evaluate
    >>> metric = evaluate.load("eval/metrics/call_validity")
    >>> schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    >>> tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": schema}}])
    >>> good, lacking = '[{"name": "weather", "arguments": {"city": "Oslo"}}]', '[{"name": "weather", "arguments": {}}]'
    >>> found = metric.compute(predictions=[good, lacking, "[{"], tools=[tools] * 3)
    >>> found["schema_valid"], found["missing_required"], round(found["parsed"], 2)
    (0.5, 1, 0.67)
"""


class CallValidity(evaluate.Metric):
    """Validity of the calls of replies."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "tools": text}),
        )

    def _compute(self, predictions: list[str], tools: list[str]) -> dict[str, Any]:
        """See `inputs_description`."""
        if not predictions:
            raise ValueError("There are no replies to measure: give at least one.")
        counts: Counter[str] = Counter()
        for number, (text, offered) in enumerate(zip(predictions, tools, strict=True)):
            schemas = _schemas(offered, number)
            calls = _calls(text)
            try:
                faults = [_faults(call, schemas) for call in calls or []]
            except referencing.exceptions.Unresolvable as error:
                raise ValueError(f"A $ref in the tools of reply {number} cannot be resolved: {error}.") from error
            counts["parsed"] += calls is not None
            counts["valid"] += calls is not None and not any(faults)
            counts["calls"] += len(faults)
            counts["schema_valid"] += sum(not found for found in faults)
            for fault in ("unknown", "missing"):
                counts[fault] += sum(fault in found for found in faults)
        return {
            "requests": len(predictions),
            "valid": counts["valid"] / len(predictions),
            "parsed": counts["parsed"] / len(predictions),
            "calls": counts["calls"],
            "schema_valid": counts["schema_valid"] / counts["calls"] if counts["calls"] else None,
            "unknown_names": counts["unknown"],
            "missing_required": counts["missing"],
        }


def _schemas(text: str | None, number: int) -> dict[str, jsonschema.Draft202012Validator]:
    """A validator for each tool of a JSON list, by name."""
    try:
        listed = json.loads(text or "")
        if not isinstance(listed, list):
            raise TypeError("it is no list")
        functions = [tool["function"] for tool in listed]
        schemas = {function["name"]: function.get("parameters") or {"type": "object"} for function in functions}
        for schema in schemas.values():
            jsonschema.Draft202012Validator.check_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError, jsonschema.SchemaError) as error:
        raise ValueError(
            f"The tools of reply {number} are no JSON list of OpenAI-style tools with JSON Schemas: {error}."
        ) from error
    # An empty registry: what is not in the schema itself is not fetched.
    registry: referencing.Registry[Any] = referencing.Registry()
    return {name: jsonschema.Draft202012Validator(schema, registry=registry) for name, schema in schemas.items()}


def _calls(text: str | None) -> list[dict[str, Any]] | None:
    """The calls that a JSON text lists, None where it is no such list."""
    try:
        listed = json.loads(text or "", parse_constant=_no_constant, object_pairs_hook=_distinct_names)
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    for call in listed:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["name"], str):
            return None
    return listed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return dict(pairs)


def _faults(call: dict[str, Any], schemas: dict[str, jsonschema.Draft202012Validator]) -> set[str]:
    """What is wrong with a call: "unknown" tool, "missing" property, or "invalid" for anything else."""
    if call["name"] not in schemas:
        return {"unknown"}
    if not isinstance(call["arguments"], dict):
        return {"invalid"}
    try:
        errors = list(schemas[call["name"]].iter_errors(call["arguments"]))
    except RecursionError:
        return {"invalid"}  # nested more deeply than can be checked
    return {"missing" if error.validator == "required" else "invalid" for error in errors}
