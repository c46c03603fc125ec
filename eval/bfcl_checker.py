"""The official AST checker of the Berkeley Function Calling Leaderboard (BFCL), found and loaded out of `bfcl-eval`.

That package pins an old numpy and some hundred more packages, of which its checker uses none. So only the checker is
loaded, from an installed package, a folder or a wheel, and what prepares functions for a prompt, with two modules
replaced: the table of the leaderboard's models, which imports the client of every vendor and of which the checker reads
one field, and the runner's folders, which that module makes when it is imported. Nothing of it stays in `sys.modules`,
so the whole package can still be imported beside it. Neither torch nor a model.

For Java and JavaScript the checker takes arguments as source code; `source_text` says how values are written.
"""

import copy
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PACKAGE = "bfcl_eval"
TESTED_VERSION = "2026.3.23"
_MODEL = "smollm-diffusion"
"""Our key in the table of models; without a low line, which the checker would turn into a slash."""

INSTALL = f"""Its package pins old versions of numpy and others, so install it without them, in a folder of its own:
    pip install --no-deps --target bfcl bfcl-eval=={TESTED_VERSION}
and name that folder:
    python -m eval.bfcl --checker-path bfcl
A wheel of {PACKAGE} or the site-packages of another environment do as well. Without the option it is imported."""


class CheckerMissingError(RuntimeError):
    """The official checker was not found, or is not where this version of ours expects it."""


@dataclass(frozen=True)
class OfficialChecker:
    """The official checker.

    Args:
        version: of the package; "unknown" where it has no metadata.
        data: the package's folder of questions and `possible_answer/`, which may lie in a wheel.
        ast_checker: the official function.
        languages: the official enumeration of languages.
        add_hints: the official function that prepares the functions of requests, in place.
    """

    version: str
    data: Traversable
    ast_checker: Any
    languages: Any
    add_hints: Any

    def shown_functions(self, name: str, functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The functions of a request as the official runner shows them to a model.

        Each description ends with a hint on the language; parameters of Java and JavaScript are strings, whose
        descriptions name the type.

        Args:
            name: id of the request, which begins with its category.
            functions: as BFCL has them; they stay as they are.
        """
        request: dict[str, Any] = {"id": name, "function": copy.deepcopy(list(functions))}
        self.add_hints([request])
        return request["function"]

    def fault(
        self,
        category: str,
        functions: Sequence[Mapping[str, Any]],
        calls: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
    ) -> str | None:
        """What is wrong with the calls for one request.

        Args:
            category: BFCL's name of it.
            functions: as BFCL has them.
            calls: `{"name", "arguments"}` each, arguments as they were decoded.
            answers: `{name: {argument: [accepted values]}}` of each call; not looked at where the category only asks
                whether to call.

        Returns:
            The type of the error as the official runner has it, or None where the calls are right.
        """
        if "irrelevance" in category:
            return "irrelevance_error:decoder_success" if calls else None
        if not calls:
            return "relevance_error:decoder_failed" if "relevance" in category else "ast_decoder:decoder_failed"
        if "relevance" in category:
            return None  # any call counts, whatever it is
        language = language_of(category)
        made = [{call["name"]: call["arguments"]} for call in calls]
        if language != "python":
            made = [{call["name"]: source_arguments(call, functions, language)} for call in calls]
        try:
            found = self.ast_checker(list(functions), made, list(answers), self.languages(language), category, _MODEL)
        # It takes for granted that values have the types that its answers have.
        except Exception as error:
            return f"checker_failed:{type(error).__name__}"
        return None if found["valid"] else str(found["error_type"])


def language_of(category: str) -> str:
    """The language of a category's functions: "python", "java" or "javascript"."""
    return next((name for name in ("javascript", "java") if name in category), "python")


# ---------------------------------------------------------------------------------------------------------------------
# Finding it
# ---------------------------------------------------------------------------------------------------------------------


def load_checker(path: Path | None = None) -> OfficialChecker:
    """Load the official checker.

    Args:
        path: the folder that holds the package, or a wheel of it; None imports what is installed.

    Raises:
        CheckerMissingError: there is none; the message says how to install it.
    """
    with _alone():
        spec = _find(path)
        package = importlib.util.module_from_spec(spec)
        assert spec.loader is not None
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
        models = ModuleType(f"{PACKAGE}.constants.model_config")
        vars(models)["MODEL_CONFIG_MAPPING"] = {_MODEL: SimpleNamespace(underscore_to_dot=False)}
        folders = ModuleType(f"{PACKAGE}.constants.eval_config")
        sys.modules |= {module.__name__: module for module in (models, folders)}
        try:
            checker = importlib.import_module(f"{PACKAGE}.eval_checker.ast_eval.ast_checker")
            enums = importlib.import_module(f"{PACKAGE}.constants.enums")
            preparation = importlib.import_module(f"{PACKAGE}.utils")
            return OfficialChecker(
                version=_version(path),
                data=importlib.resources.files(package) / "data",
                ast_checker=checker.ast_checker,
                languages=enums.Language,
                add_hints=preparation.add_language_specific_hint_to_function_doc,
            )
        except (ImportError, AttributeError) as error:
            raise CheckerMissingError(
                f"{spec.origin} holds no checker that is known here ({error}); version {TESTED_VERSION} is.\n{INSTALL}"
            ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Keep what the block imports of the package out of `sys.modules`, and what is there away from the block."""
    hidden = {name: sys.modules.pop(name) for name in _imported()}
    try:
        yield
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(hidden)


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == PACKAGE]


def _find(path: Path | None) -> ModuleSpec:
    if path is not None and not path.exists():
        raise CheckerMissingError(f"--checker-path: there is no {path}.\n{INSTALL}")
    spec = importlib.util.find_spec(PACKAGE) if path is None else PathFinder.find_spec(PACKAGE, [str(path)])
    # A folder of that name without code in it, such as one where results lie, is found as a namespace.
    if spec is None or spec.loader is None or spec.origin is None:
        where = "in this environment" if path is None else f"in {path}, which must hold the folder {PACKAGE}"
        raise CheckerMissingError(f"There is no official checker of BFCL {where}.\n{INSTALL}")
    return spec


def _version(path: Path | None) -> str:
    places = sys.path if path is None else [str(path)]
    found = importlib.metadata.distributions(name=PACKAGE, path=places)
    return next((distribution.version for distribution in found), "unknown")


# ---------------------------------------------------------------------------------------------------------------------
# Java and JavaScript
# ---------------------------------------------------------------------------------------------------------------------


def source_arguments(call: Mapping[str, Any], functions: Sequence[Mapping[str, Any]], language: str) -> dict[str, str]:
    """Arguments of a call as source code.

    Args:
        call: `{"name", "arguments"}`.
        functions: as BFCL has them.
        language: "java" or "javascript".
    """
    parameters: Mapping[str, Any] = next(
        (f["parameters"]["properties"] for f in functions if f["name"] == call["name"]), {}
    )
    return {name: source_text(value, parameters.get(name, {}), language) for name, value in call["arguments"].items()}


def source_text(value: Any, parameter: Mapping[str, Any], language: str) -> str:
    """A decoded value as source code, as one would write it at the place of this parameter.

    Strings are not quoted, for the answers are not: a parameter takes the name of a variable in the same way. Inside
    arrays and maps they are, as the languages ask for; so BFCL's own answers do not pass everywhere, see the tests.

    Args:
        value: any JSON value.
        parameter: BFCL's schema of it; `type` and the type of its `items` choose between ways to write the same value.
        language: "java" or "javascript".
    """
    if isinstance(value, str):
        return value
    kind = str(parameter.get("type"))
    if language == "javascript":
        return f"{value}n" if kind == "Bigint" and isinstance(value, int) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        item = parameter.get("items") or {}
        items = ", ".join(_java(one, str(item.get("type"))) for one in value)
        if kind == "ArrayList":
            return f"new ArrayList<>(Arrays.asList({items}))" if value else "new ArrayList<>()"
        return f"new {_JAVA_ITEMS.get(str(item.get('type')), 'Object')}[]{{{items}}}"
    return _java(value, kind)


_JAVA_ITEMS = {"integer": "int", "long": "long", "float": "float", "double": "double", "boolean": "boolean"} | {
    name: name for name in ("byte", "short", "char", "String")
}
"""Types of items as an array names them."""


def _java(value: Any, kind: str) -> str:
    """A value inside others; numbers have the suffix of their type."""
    if isinstance(value, dict):
        puts = " ".join(
            f"put({json.dumps(name, ensure_ascii=False)}, {_java(one, '')});" for name, one in value.items()
        )
        return f"new HashMap<String, Object>() {{{{ {puts} }}}}" if value else "new HashMap<>()"
    if isinstance(value, list):
        return f"new Object[]{{{', '.join(_java(one, '') for one in value)}}}"
    if isinstance(value, str) and kind == "char" and len(value) == 1:
        return f"'{value}'"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value}{ {'long': 'L', 'float': 'f'}.get(kind, '') }"
    return json.dumps(value, ensure_ascii=False)
