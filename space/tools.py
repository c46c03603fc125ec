"""Tools as a visitor types them: a JSON list, or the source of Python functions, which is read and never run.

Takes text; gives tools as `respond` takes them. What cannot be read is a `ValueError` whose message says where the
fault is and what to do, fit to be shown as it is.
"""

import ast
import inspect
import json
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, Optional, Union

from transformers.utils import get_json_schema

MAX_TEXT = 16_000
MAX_TOOLS = 16

_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "None": NoneType,
    "Any": Any,
    **dict.fromkeys(("list", "List"), list),
    **dict.fromkeys(("dict", "Dict"), dict),
    **dict.fromkeys(("tuple", "Tuple"), tuple),
}
_KNOWN = "str, int, float, bool, list, dict, tuple, Literal, Optional, Union and None"


def read_tools(text: str) -> list[dict[str, Any]]:
    """Read tools out of what a visitor typed.

    Args:
        text: a JSON list of tools or a single one, or Python functions with type hints and a Google-style docstring;
            nothing but space is no tools.

    Returns:
        The tools. Those of JSON are as they were given: whether their schemas hold is for the model to say.

    Raises:
        ValueError: the text is too long, or neither JSON nor Python, or a function gives no schema.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"The tools have {len(text):,} characters; this page takes at most {MAX_TEXT:,}.")
    try:
        tools = _from_json(text) if text.lstrip()[:1] in ("[", "{") else _from_python(text)
    except (RecursionError, MemoryError):
        raise ValueError("The tools are nested too deeply to be read: flatten them.") from None
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"There are {len(tools)} tools; this page takes at most {MAX_TOOLS}.")
    return tools


def signature(tool: dict[str, Any]) -> str:
    """One line for a tool: its name and arguments, `?` behind those that may be left out.

    Args:
        tool: of any dialect; what is missing is left out.
    """
    function = tool.get("function", tool)
    function = function if isinstance(function, dict) else {}
    schemas = (function.get(key) for key in ("parameters", "input_schema", "inputSchema"))
    schema = next((schema for schema in schemas if isinstance(schema, dict)), {})
    properties, required = schema.get("properties"), schema.get("required")
    required = required if isinstance(required, list) else []
    names = [name if name in required else f"{name}?" for name in properties] if isinstance(properties, dict) else []
    return f"{function.get('name', 'unnamed')}({', '.join(names)})"


def _from_json(text: str) -> list[dict[str, Any]]:
    """Tools of a JSON text."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The tools are not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    tools = given if isinstance(given, list) else [given]
    for index, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise ValueError(
                f"Tool {index} is {json.dumps(tool)[:60]}, not an object: write "
                '{"name": ..., "description": ..., "parameters": {...}}.'
            )
    return tools


def _from_python(text: str) -> list[dict[str, Any]]:
    """Tools of the functions in a Python source."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        place = f"line {error.lineno}, column {error.offset}: {error.msg}"
        raise ValueError(f"The tools are neither a JSON list nor Python functions: {place}.") from None
    except ValueError as error:  # a null byte, in some versions of Python
        raise ValueError(f"The tools are neither a JSON list nor Python functions: {error}.") from None
    functions = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if body and not functions:
        raise ValueError("The tools hold no function: write `def name(argument: type):` with a docstring.")
    return [_schema(node) for node in functions]


def _schema(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """What transformers makes of a function with this signature and docstring."""
    try:
        return get_json_schema(_stand_in(node))
    except (RecursionError, MemoryError):
        raise
    except Exception as error:  # transformers raises its own kinds, one per docstring fault
        raise ValueError(f"Line {node.lineno}, function {node.name!r}: {error}") from None


def _stand_in(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Callable[[], None]:
    """A function that does nothing and looks like the one in the source, made without running any of it."""
    given = node.args
    if given.vararg or given.kwarg:
        raise ValueError("*args and **kwargs have no schema: name every argument.")
    positional = [*given.posonlyargs, *given.args]
    without_default = len(positional) - len(given.defaults)
    optional = {argument.arg for argument in positional[without_default:]}
    optional |= {argument.arg for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default}
    arguments = [*positional, *given.kwonlyargs]
    hints = {argument.arg: _hint(argument.annotation) for argument in arguments if argument.annotation}
    empty = inspect.Parameter.empty

    def stand_in() -> None: ...

    stand_in.__name__, stand_in.__doc__, stand_in.__annotations__ = node.name, ast.get_docstring(node), hints
    parameters = [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if argument.arg in optional else empty,
            annotation=hints.get(argument.arg, empty),
        )
        for argument in arguments
    ]
    stand_in.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return stand_in


def _hint(node: ast.expr) -> Any:
    """The type that a type hint names; only types that have a schema are known, nothing is evaluated."""
    match node:
        case ast.Constant(value=None):
            return NoneType
        case ast.Constant(value=str(text)):
            return _hint(ast.parse(text, mode="eval").body)
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(), attr=name) if name in _TYPES:
            return _TYPES[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_hint(left), _hint(right)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            return _generic(node, name, list(inner.elts) if isinstance(inner, ast.Tuple) else [inner])
    raise ValueError(f"the type `{ast.unparse(node)}` has no schema here: use {_KNOWN}.")


def _generic(node: ast.Subscript, name: str, inner: list[ast.expr]) -> Any:
    """The type of `name[inner, ...]`."""
    if name == "Literal":
        try:
            return Literal[tuple(ast.literal_eval(value) for value in inner)]
        except (ValueError, TypeError):
            raise ValueError(f"`{ast.unparse(node)}` may list texts, numbers and booleans only.") from None
    if name == "Optional" and len(inner) == 1:
        return Optional[_hint(inner[0])]  # noqa: UP045
    if name == "Union":
        return Union[tuple(_hint(one) for one in inner)]  # noqa: UP007
    if _TYPES.get(name) in (list, dict, tuple):
        return _TYPES[name][tuple(_hint(one) for one in inner)]
    raise ValueError(f"the type `{ast.unparse(node)}` has no schema here: use {_KNOWN}.")
