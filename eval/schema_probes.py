"""What a schema engine must accept and reject: a probe or more for every JSON Schema keyword that tools use.

A probe is a schema with values on either side of it. `eval.schema_coverage` puts them to engines, the tests put them to
jsonschema. Knows no engine. The lists are data: read them as a table of keyword, variant, schema, what fits, what
does not.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Probe:
    """A schema, and what it allows and forbids.

    Args:
        keyword: the keyword or the dialect's word that it is about.
        variant: which use of the keyword, empty for the plain one; unique for the keyword.
        schema: of one argument, or of a tool's whole parameters when `whole`.
        accepts: JSON values that fit, properties in schema order.
        rejects: JSON values that do not fit.
        broken: texts that are not JSON.
        whole: `schema` is the parameters object and the values are whole arguments.
        standard: the same schema in draft 2020-12 and with regular expressions for Python, where `schema` is not.
    """

    keyword: str
    variant: str
    schema: Any
    accepts: Sequence[Any]
    rejects: Sequence[Any]
    broken: Sequence[str] = ()
    whole: bool = False
    standard: Any = None

    @property
    def name(self) -> str:
        """Keyword and variant; no two probes share it."""
        return f"{self.keyword}: {self.variant}" if self.variant else self.keyword

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of a tool that asks for this schema."""
        return self.schema if self.whole else _one_argument(self.schema)

    @property
    def standard_parameters(self) -> dict[str, Any]:
        """The same in draft 2020-12."""
        if self.standard is None:
            return self.parameters
        return self.standard if self.whole else _one_argument(self.standard)

    @property
    def accepted_texts(self) -> list[str]:
        """Arguments that fit, as `json.dumps` writes them."""
        return [self._text(json.dumps(value, ensure_ascii=False)) for value in self.accepts]

    @property
    def rejected_texts(self) -> list[str]:
        """Arguments that do not fit, and what is no JSON."""
        values = [json.dumps(value, ensure_ascii=False) for value in self.rejects]
        return [self._text(text) for text in (*values, *self.broken)]

    def _text(self, value: str) -> str:
        return value if self.whole else f'{{"value": {value}}}'


def _one_argument(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"value": schema}, "required": ["value"], "additionalProperties": False}


def _record(properties: dict[str, Any], *required: str, **keywords: Any) -> dict[str, Any]:
    """An object of these properties and no others."""
    listed = {"required": list(required)} if required else {}
    return {"type": "object", "properties": properties, **listed, "additionalProperties": False, **keywords}


_STRING: dict[str, Any] = {"type": "string"}
_INTEGER: dict[str, Any] = {"type": "integer"}
_NULL: dict[str, Any] = {"type": "null"}


def _text(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


def _integer(**keywords: Any) -> dict[str, Any]:
    return {"type": "integer", **keywords}


def _number(**keywords: Any) -> dict[str, Any]:
    return {"type": "number", **keywords}


def _array(items: Any = None, **keywords: Any) -> dict[str, Any]:
    return {"type": "array", **({} if items is None else {"items": items}), **keywords}


_TYPES = (
    Probe(
        "type",
        "string",
        _STRING,
        [
            "",
            "a",
            "é🙂",
            'say "hi"',
            "C:\\new\\table",
            "e\u0301 עברית",
            "</tool_call>",
            "/",
        ],
        [1, None, True, [], {}, ["a"]],
        ['"a', '"\\x"', '"\\u12"', "'a'", "a", '"a""b"'],
    ),
    Probe(
        "type",
        "string with control characters",
        _STRING,
        ["a\tb\nc\r", "\b\f", "\x01\x1f"],
        [1],
        ['"a\tb"', '"a\nb"', '"\x01"'],
    ),
    Probe("type", "string with U+007F", _STRING, ["\x7f", "a\x7fb"], [1]),
    Probe(
        "type",
        "integer",
        _INTEGER,
        [0, -1, 10, 2**53 + 1, -(2**63), 10**30],
        [1.5, "1", True, None, [1]],
        ["01", "-01", "+1", "-", "1.", "0x1", "1 2", "1,"],
    ),
    Probe(
        "type",
        "number",
        _number(),
        [0, -1, 10**30, 0.5, -0.25, 12.0, 3.141592653589793, 123456.789],
        ["1", True, None, [1]],
        [".5", "1.", "01", "-", "--1", "1.5.2", "NaN", "Infinity", "-Infinity"],
    ),
    Probe("type", "number with exponent", _number(), [1e-05, 1.5e300, -2.5e-10, 1e16, 5e-324], ["1e5"], ["1e", "1e+"]),
    Probe("type", "boolean", {"type": "boolean"}, [True, False], [0, 1, "true", None], ["True", "tru", "FALSE"]),
    Probe("type", "null", _NULL, [None], [0, False, "null", []], ["None", "nul"]),
    Probe(
        "type",
        "array",
        _array(),
        [[], [1], ["a", None, {"b": [True]}]],
        [{}, "[]", 1, None],
        ["[1,]", "[1 2]", "[", "[,]"],
    ),
    Probe(
        "type",
        "object",
        {"type": "object"},
        [{}, {"a": 1}, {"a": {"b": [None]}, "é": "x"}],
        [[], "{}", 1, None],
        ['{"a" 1}', '{"a": }', "{a: 1}", '{"a": 1,}'],
    ),
    Probe("type", "list with null", {"type": ["string", "null"]}, ["", "null", None], [0, False, [], {}]),
    Probe("type", "list of scalars", {"type": ["integer", "boolean", "string"]}, [1, True, "1"], [1.5, None, [], {}]),
    Probe(
        "type",
        "list with containers",
        {"type": ["object", "array", "integer"], "properties": {"a": _STRING}, "items": _INTEGER},
        [{"a": "x"}, {}, [1, 2], [], 3],
        [{"a": 1}, ["x"], "x", None],
    ),
    Probe("type", "list of one", {"type": ["integer"]}, [1], ["1", None]),
    Probe("true", "", True, [None, 1, "a", [1], {"a": 1}], [], ["", "x", "[1"]),
    Probe("{}", "", {}, [None, -1.5, "a", [[]], {"a": {}}], [], ["", "x", '{"a"}']),
    Probe("{}", "description only", {"description": "anything"}, [None, 0.5, "a", [], {"a": [1]}], [], ["", "nil"]),
    Probe("false", "", _record({"a": _INTEGER, "b": False}, "a"), [{"a": 1}], [{"a": 1, "b": 1}, {}], whole=True),
)

_CLOSED = (
    Probe("enum", "", {"enum": ["a", "b"]}, ["a", "b"], ["c", "", "ab", None, 1, ["a"]]),
    Probe("enum", "with type", _text(enum=["north", "south"]), ["north", "south"], ["nort", "northsouth", "North"]),
    Probe(
        "enum", "prefixes of each other", {"enum": ["", "a", "ab", "abc"]}, ["", "a", "ab", "abc"], ["b", "abcd", "ac"]
    ),
    Probe("enum", "non-ASCII", {"enum": ["café", "東京", "🙂"]}, ["café", "東京", "🙂"], ["cafe", "東", "🙃"]),
    Probe("enum", "escapes", {"enum": ['a"b', "a\\b", "a\nb"]}, ['a"b', "a\\b", "a\nb"], ["ab", "a/b", "anb"]),
    Probe("enum", "numbers", {"enum": [1, 10, -2, 0.5]}, [1, 10, -2, 0.5], [0, 11, 2, "1", True, None]),
    Probe("enum", "mixed", {"enum": ["1", 1, None, False]}, ["1", 1, None, False], ["null", 0, True, "", []]),
    Probe(
        "enum",
        "containers",
        {"enum": [{"a": 1, "b": [2]}, [1, "x"], {}, []]},
        [{"a": 1, "b": [2]}, [1, "x"], {}, []],
        [{"a": 1}, [1], {"a": 1, "b": []}, None],
    ),
    Probe("enum", "filtered by type", {"type": "string", "enum": ["a", 1, None]}, ["a"], [1, None, "b"]),
    Probe("enum", "filtered by a bound", _integer(enum=[1, 5, 9], minimum=4), [5, 9], [1, 6]),
    Probe("enum", "filtered by length", _text(enum=["a", "abc"], minLength=2), ["abc"], ["a"]),
    Probe("const", "", {"const": "fixed"}, ["fixed"], ["", "fixe", "other", None]),
    Probe("const", "non-ASCII", {"const": "naïve — 日本 🙂"}, ["naïve — 日本 🙂"], ["naive", ""]),
    Probe("const", "number", {"const": 42}, [42], [4, 421, "42", None]),
    Probe("const", "null", {"const": None}, [None], ["null", 0, False]),
    Probe("const", "object", {"const": {"a": [1, {"b": None}]}}, [{"a": [1, {"b": None}]}], [{}, {"a": []}, []]),
)

_OBJECTS = (
    Probe(
        "properties",
        "",
        _record({"a": _INTEGER, "b": _STRING}, "a", "b"),
        [{"a": 1, "b": "x"}],
        [{"a": "x", "b": "x"}, {"a": 1, "b": 2}],
        ['{"a": 1 "b": "x"}', '{"a": 1, "b": "x"', '{"a": 1, "b": "x"}}'],
        whole=True,
    ),
    Probe(
        "properties",
        "names that JSON escapes",
        _record({'a"b': _INTEGER, "c\\d": _INTEGER, "é\n": _INTEGER}, 'a"b', "c\\d", "é\n"),
        [{'a"b': 1, "c\\d": 2, "é\n": 3}],
        [{"ab": 1, "cd": 2, "é": 3}],
        whole=True,
    ),
    Probe(
        "properties",
        "nested",
        _record({"p": _record({"q": _record({"r": _INTEGER}, "r")}, "q")}, "p"),
        [{"p": {"q": {"r": 1}}}],
        [{"p": {"q": {"r": "1"}}}, {"p": {"q": {}}}, {"p": {}}, {}, {"p": 1}],
        whole=True,
    ),
    Probe("properties", "none", _record({}), [{}], [{"a": 1}], whole=True),
    Probe(
        "properties",
        "in another order than the schema's",
        _record({"a": _INTEGER, "b": _STRING}, "a", "b"),
        [{"b": "x", "a": 1}],
        [{"b": 1, "a": 1}],
        whole=True,
    ),
    Probe(
        "required",
        "",
        _record({"a": _INTEGER, "b": _INTEGER, "c": _INTEGER}, "b"),
        [{"b": 1}, {"a": 1, "b": 2}, {"b": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}],
        [{}, {"a": 1}, {"a": 1, "c": 2}],
        ['{, "b": 1}', '{"b": 1, }'],
        whole=True,
    ),
    Probe(
        "required",
        "none",
        _record({"a": _INTEGER, "b": _INTEGER}),
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": None}, {"b": "x"}],
        whole=True,
    ),
    Probe(
        "required",
        "not under properties",
        {"type": "object", "properties": {"a": _INTEGER}, "required": ["a", "b"]},
        [{"a": 1, "b": 2}, {"a": 1, "b": "x"}],
        [{"a": 1}, {}],
        whole=True,
    ),
    Probe(
        "additionalProperties",
        "false",
        _record({"a": _INTEGER}),
        [{}, {"a": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
        whole=True,
    ),
    Probe(
        "additionalProperties",
        "true",
        {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"], "additionalProperties": True},
        [{"a": 1}, {"a": 1, "b": "x"}, {"a": 1, "b": [None], "c": {}}],
        [{"a": "x"}, {}, {"b": 1}],
        whole=True,
    ),
    Probe(
        "additionalProperties",
        "schema",
        {"type": "object", "additionalProperties": _INTEGER},
        [{}, {"a": 1}, {"a": 1, "é": 2, "c d": 3}],
        [{"a": "x"}, {"a": 1, "b": None}],
    ),
    Probe(
        "additionalProperties",
        "schema beside properties",
        {"type": "object", "properties": {"a": _STRING}, "required": ["a"], "additionalProperties": _INTEGER},
        [{"a": "x"}, {"a": "x", "b": 1}, {"a": "x", "b": 1, "c": 2}],
        [{"a": 1}, {"a": "x", "b": "y"}, {"b": 1}],
    ),
    Probe(
        "additionalProperties",
        "schema of objects",
        {"type": "object", "additionalProperties": _record({"n": _INTEGER}, "n")},
        [{}, {"k": {"n": 1}}, {"k": {"n": 1}, "l": {"n": 2}}],
        [{"k": {}}, {"k": 1}, {"k": {"n": "x"}}],
    ),
    Probe(
        "patternProperties",
        "",
        {"type": "object", "patternProperties": {"^n_": _INTEGER, "^s_": _STRING}, "additionalProperties": False},
        [{}, {"n_a": 1}, {"s_a": "x"}, {"n_a": 1, "s_a": "x"}],
        [{"n_a": "x"}, {"s_a": 1}, {"other": 1}, {"xn_": 1}],
    ),
    Probe(
        "patternProperties",
        "beside properties",
        {"type": "object", "properties": {"id": _INTEGER}, "required": ["id"], "patternProperties": {"^x-": _STRING}},
        [{"id": 1}, {"id": 1, "x-a": "v"}],
        [{"id": 1, "x-a": 1}, {"id": "v"}, {"x-a": "v"}],
    ),
    Probe(
        "propertyNames",
        "pattern",
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": _INTEGER},
        [{}, {"abc": 1}, {"a": 1, "b": 2}],
        [{"A": 1}, {"": 1}, {"a": 1, "b2": 2}],
    ),
    Probe(
        "propertyNames",
        "enum",
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": _INTEGER},
        [{}, {"x": 1}, {"x": 1, "y": 2}],
        [{"z": 1}, {"xy": 1}],
    ),
    Probe(
        "propertyNames",
        "maxLength",
        {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": _INTEGER},
        [{}, {"é🙂": 1}],
        [{"abc": 1}],
    ),
    Probe(
        "minProperties",
        "",
        {"type": "object", "additionalProperties": _INTEGER, "minProperties": 2},
        [{"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}],
        [{}, {"a": 1}],
    ),
    Probe(
        "minProperties",
        "of declared properties",
        _record({"a": _INTEGER, "b": _INTEGER, "c": _INTEGER}, minProperties=1),
        [{"a": 1}, {"c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{}],
    ),
    Probe(
        "maxProperties",
        "",
        {"type": "object", "additionalProperties": _INTEGER, "maxProperties": 1},
        [{}, {"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    Probe(
        "maxProperties",
        "of declared properties",
        _record({"a": _INTEGER, "b": _INTEGER, "c": _INTEGER}, maxProperties=2),
        [{}, {"a": 1, "c": 1}],
        [{"a": 1, "b": 1, "c": 1}],
    ),
    Probe(
        "dependentRequired",
        "",
        _record({"card": _STRING, "code": _INTEGER}, dependentRequired={"card": ["code"]}),
        [{}, {"code": 1}, {"card": "x", "code": 1}],
        [{"card": "x"}],
    ),
    Probe(
        "dependentSchemas",
        "",
        _record(
            {"kind": _STRING, "size": _INTEGER}, dependentSchemas={"kind": {"properties": {"size": {"minimum": 5}}}}
        ),
        [{}, {"size": 1}, {"kind": "x"}, {"kind": "x", "size": 5}],
        [{"kind": "x", "size": 4}],
    ),
    Probe(
        "unevaluatedProperties",
        "false",
        {
            "type": "object",
            "allOf": [{"properties": {"a": _INTEGER}}, {"properties": {"b": _STRING}}],
            "unevaluatedProperties": False,
        },
        [{}, {"a": 1}, {"a": 1, "b": "x"}],
        [{"c": 1}, {"a": "x"}, {"a": 1, "c": 1}],
    ),
    Probe(
        "default",
        "",
        _record({"city": _STRING, "unit": _text(enum=["C", "F"], default="C")}, "city"),
        [{"city": "x"}, {"city": "x", "unit": "F"}, {"city": "x", "unit": "C"}],
        [{"city": "x", "unit": "K"}, {"unit": "C"}],
        whole=True,
    ),
)

_ARRAYS = (
    Probe("items", "", _array(_INTEGER), [[], [1], [1, -2, 3]], [["a"], [1, None], {}, 1], ["[1,2", "[,1]", "[1, ]"]),
    Probe(
        "items",
        "objects",
        _array(_record({"a": _INTEGER, "b": _STRING}, "a")),
        [[], [{"a": 1}], [{"a": 1, "b": "x"}, {"a": 2}]],
        [[{}], [{"b": "x"}], [1], [{"a": 1}, {"a": "x"}]],
    ),
    Probe("items", "arrays", _array(_array(_number())), [[], [[]], [[1], [0.5, 2]]], [[1], [["a"]], [[[1]]]]),
    Probe("items", "25 of them", _array(_INTEGER), [list(range(25))], [[*range(24), "x"]]),
    Probe("items", "true", _array(True), [[], [1, "a", None]], [{}, "a"]),
    Probe("items", "false", _array(False), [[]], [[1], [None]]),
    Probe(
        "prefixItems",
        "",
        _array(prefixItems=[_STRING, _INTEGER], items=False, minItems=2),
        [["a", 1]],
        [[1, "a"], ["a"], ["a", 1, 2], []],
    ),
    Probe(
        "prefixItems",
        "and items",
        _array(prefixItems=[_STRING], items=_INTEGER),
        [[], ["a"], ["a", 1, 2]],
        [[1], ["a", "b"], ["a", 1, None]],
    ),
    Probe(
        "prefixItems",
        "without items",
        _array(prefixItems=[_STRING, {"type": "boolean"}]),
        [["a", True], ["a", True, 1, "x"], ["a"], []],
        [[True, "a"], ["a", 1]],
    ),
    Probe("minItems", "", _array(_INTEGER, minItems=2), [[1, 2], [1, 2, 3]], [[], [1]]),
    Probe("maxItems", "", _array(_INTEGER, maxItems=2), [[], [1], [1, 2]], [[1, 2, 3]]),
    Probe("maxItems", "0", _array(_INTEGER, maxItems=0), [[]], [[1]]),
    Probe(
        "maxItems", "and minItems", _array(_STRING, minItems=1, maxItems=3), [["a"], ["a", "b", "c"]], [[], [*"abcd"]]
    ),
    Probe("uniqueItems", "", _array(_INTEGER, uniqueItems=True), [[], [1], [1, 2, 11]], [[1, 1], [1, 2, 1]]),
    Probe(
        "uniqueItems",
        "of an enum",
        _array({"enum": ["red", "green", "blue"]}, uniqueItems=True),
        [[], ["red"], ["blue", "red", "green"]],
        [["red", "red"], ["red", "blue", "red"], ["black"]],
    ),
    Probe(
        "uniqueItems",
        "of objects",
        _array(_record({"a": _INTEGER}), uniqueItems=True),
        [[], [{}, {"a": 1}], [{"a": 1}, {"a": 2}]],
        [[{}, {}], [{"a": 1}, {"a": 1}]],
    ),
    Probe("uniqueItems", "false", _array(_INTEGER, uniqueItems=False), [[], [1, 1]], [["a"]]),
    Probe("contains", "", _array(_INTEGER, contains={"minimum": 10}), [[10], [1, 11, 2]], [[], [1], [9, 2]]),
    Probe("contains", "const", _array(_STRING, contains={"const": "me"}), [["me"], ["a", "me"]], [[], ["a"], ["meme"]]),
    Probe(
        "minContains",
        "",
        _array(_INTEGER, contains={"minimum": 10}, minContains=2),
        [[10, 11], [1, 10, 12]],
        [[], [10], [10, 1]],
    ),
    Probe(
        "maxContains",
        "",
        _array(_INTEGER, contains={"minimum": 10}, maxContains=1),
        [[10], [1, 10, 2]],
        [[], [10, 11], [10, 1, 12]],
    ),
    Probe(
        "unevaluatedItems",
        "false",
        _array(prefixItems=[_INTEGER], unevaluatedItems=False),
        [[], [1]],
        [["a"], [1, 2]],
    ),
)

# What \s is in ECMA-262.
_SPACES = r"\t\n\x0b\f\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"

_STRINGS = (
    Probe("minLength", "", _text(minLength=2), ["ab", "abc", "  "], ["", "a"]),
    Probe("minLength", "counts characters, not bytes", _text(minLength=2), ["é🙂", "日本"], ["é", "🙂"]),
    Probe("minLength", "counts an escape once", _text(minLength=2), ["\n\n", '""', "\\\x01"], ["\n", '"', "\x01"]),
    Probe("maxLength", "", _text(maxLength=3), ["", "a", "abc"], ["abcd", "abcdefgh"]),
    Probe("maxLength", "counts characters, not bytes", _text(maxLength=2), ["é🙂", "日本", "🙂"], ["éab", "日本語"]),
    Probe("maxLength", "counts an escape once", _text(maxLength=2), ["\n\t", '""', "\\\x1f"], ["\n\n\n", '"""']),
    Probe("maxLength", "and minLength", _text(minLength=2, maxLength=3), ["ab", "abc", "é\n"], ["", "a", "abcd"]),
    Probe("maxLength", "10,000", _text(maxLength=10000), ["", "x" * 200, "y" * 10000], ["z" * 10001]),
    Probe("pattern", "anchored", _text(pattern="^[A-Z]{2}[0-9]{3}$"), ["AB123"], ["AB12", "xAB123", "AB1234", ""]),
    Probe("pattern", "unanchored", _text(pattern="b"), ["b", "abc", "é\nb"], ["", "ac", "B"]),
    Probe("pattern", "anchored in front", _text(pattern="^ab"), ["ab", "abc", "ab\n"], ["xab", "a", ""]),
    Probe("pattern", "anchored behind", _text(pattern="yz$"), ["yz", "xyz"], ["yza", "y", ""]),
    Probe("pattern", "anchors inside alternatives", _text(pattern="^cat|dog$"), ["catx", "xdog"], ["xcat", "dogx", ""]),
    Probe(
        "pattern", "$ ends the text", _text(pattern="^ab$"), ["ab"], ["ab\n", "abc"], standard=_text(pattern=r"^ab\Z")
    ),
    Probe(
        "pattern",
        "positive lookahead",
        _text(pattern=r"^(?=.*[A-Z])(?=.*\d).{4,}$"),
        ["aB3d", "Ab12345", "🙂Z9é"],
        ["abcd", "ABCD", "1234", "aB3"],
    ),
    Probe(
        "pattern", "negative lookahead", _text(pattern="^(?!.*foo)[a-z]+$"), ["bar", "fo", "of"], ["foo", "afoob", ""]
    ),
    Probe(
        "pattern",
        "e-mail of zod",
        _text(
            pattern=r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
        ),
        ["ann@example.org", "a.b+c@mail.example.co"],
        [".a@b.org", "a..b@c.org", "a@b", "a.@b.org", ""],
    ),
    Probe("pattern", "lookbehind", _text(pattern="(?<=a)b"), ["ab", "xaby"], ["b", "cb", ""]),
    Probe("pattern", "back-reference", _text(pattern=r"^(a|b)\1$"), ["aa", "bb"], ["ab", "a", "aaa"]),
    Probe(
        "pattern",
        "word boundary",
        _text(pattern=r"\bcat\b"),
        ["cat", "a cat!"],
        ["concat", "cats", ""],
        standard=_text(pattern=r"(?<![0-9A-Z_a-z])cat(?![0-9A-Z_a-z])"),
    ),
    Probe(
        "pattern",
        "classes",
        _text(pattern=r"^\d{3}-\w+\s\S\D$"),
        ["123-a_b x-", "000-Z \\y"],
        ["12-a xy", "123-a-b"],
        standard=_text(pattern=rf"^[0-9]{{3}}-[0-9A-Za-z_]+[{_SPACES}][^{_SPACES}][^0-9]\Z"),
    ),
    Probe(
        "pattern",
        "\\d is ASCII",
        _text(pattern=r"^\d+$"),
        ["0", "42"],
        ["٣", "４"],
        standard=_text(pattern="^[0-9]+$"),
    ),
    Probe("pattern", "escaped signs", _text(pattern=r"^\$\(a\.b\)\/\[c\]\\$"), ["$(a.b)/[c]\\"], ["$(axb)/[c]\\", ""]),
    Probe("pattern", "code points", _text(pattern=r"^\u00e9\x41$"), ["éA"], ["eA", "é", "u00e9x41"]),
    Probe("pattern", "quotes and backslashes", _text(pattern=r'^"[^"\\]*\\"$'), ['"a\\"', '"\\"'], ['"a"', "a", '"']),
    Probe("pattern", "line breaks and tabs", _text(pattern=r"^a\nb\tc$"), ["a\nb\tc"], ["a b c", "anbtc"]),
    Probe("pattern", "a dot is a character", _text(pattern="^.$"), ["a", "é", "🙂", '"', "\t"], ["", "ab", "\n"]),
    Probe("pattern", "non-ASCII class", _text(pattern="^[à-ÿ日]+$"), ["éü", "日é"], ["a", "本", ""]),
    Probe("pattern", "negated class", _text(pattern="^[^ab]$"), ["c", "é", "🙂", "\n", '"'], ["a", "b", "cc", ""]),
    Probe(
        "pattern",
        "groups and lazy counts",
        _text(pattern="^(?:ab)+?(?<n>c){0,2}$"),
        ["ab", "ababcc"],
        ["c", "abccc"],
        standard=_text(pattern="^(?:ab)+?(?P<n>c){0,2}$"),
    ),
    Probe(
        "pattern",
        "Unicode property",
        _text(pattern=r"^\p{L}+$"),
        ["aé", "日本"],
        ["1", "a1", ""],
        standard=_text(pattern=r"^[^\W\d_]+$"),
    ),
    Probe("pattern", "and maxLength", _text(pattern="^[a-z]+$", maxLength=3), ["a", "abc"], ["", "abcd", "A"]),
    Probe("pattern", "and minLength", _text(pattern="^a+b*$", minLength=3), ["aab", "abbb"], ["ab", "a", "bbb"]),
)

_FORMATS = (
    Probe(
        "format",
        "date",
        _text(format="date"),
        ["2024-02-29", "1999-12-31", "2000-01-01"],
        ["2023-02-29", "2024-13-01", "2024-04-31", "2024-1-1", "20240229", "2024-00-10", ""],
    ),
    Probe(
        "format",
        "date-time",
        _text(format="date-time"),
        ["2024-02-29T12:30:00Z", "2024-02-28T12:30:00.123+05:30", "1999-12-31T23:59:59-08:00"],
        ["2024-02-29 at 12", "2024-02-28T25:00:00Z", "2024-02-30T12:00:00Z", "2024-02-28T12:30:00", "2024-02-28"],
    ),
    Probe(
        "format",
        "time",
        _text(format="time"),
        ["12:30:00Z", "23:59:59.5+01:00", "00:00:00-11:30"],
        ["24:00:00Z", "12:60:00Z", "12:30", "noon", "1:00:00Z", ""],
    ),
    Probe(
        "format",
        "duration",
        _text(format="duration"),
        ["P1D", "PT1H30M", "P1Y2M3DT4H5M6S", "P2W"],
        ["1D", "P", "PT", "P1H", "1 day", ""],
    ),
    Probe(
        "format",
        "email",
        _text(format="email"),
        ["ann@example.org", "a.b+c@mail.example.co.uk"],
        ["ann", "ann.example.org", ""],
    ),
    Probe(
        "format",
        "uri",
        _text(format="uri"),
        ["https://example.org/a/b?c=d&e=%20f#g", "mailto:ann@example.org", "urn:isbn:0451450523"],
        ["example.org/a", "/a/b", "http://a b", ""],
    ),
    Probe(
        "format",
        "uuid",
        _text(format="uuid"),
        ["123e4567-e89b-12d3-a456-426614174000", "ABCDEF01-2345-6789-ABCD-EF0123456789"],
        ["123e4567e89b12d3a456426614174000", "123e4567-e89b-12d3-a456-42661417400g", "123e4567", ""],
    ),
    Probe(
        "format",
        "ipv4",
        _text(format="ipv4"),
        ["192.168.0.1", "0.0.0.0", "255.255.255.255"],
        ["256.1.1.1", "1.2.3", "1.2.3.4.5", "1.2.3.999", "a.b.c.d", ""],
    ),
    Probe(
        "format",
        "ipv6",
        _text(format="ipv6"),
        ["::1", "::", "2001:db8::ff00:42:8329", "fe80:0:0:0:0:0:0:1", "::ffff:192.0.2.1"],
        ["1::2::3", "12345::", "::g", "1:2:3:4:5:6:7", ""],
    ),
    Probe(
        "format",
        "hostname",
        _text(format="hostname"),
        ["example.org", "a-b.c1.example.org", "localhost"],
        ["-a.org", "a..b", "a b", "x" * 64 + ".org", ""],
    ),
    Probe("format", "and maxLength", _text(format="email", maxLength=12), ["a@b.org"], ["ann@example.org", "ann"]),
    Probe(
        "format", "and pattern", _text(format="date", pattern="^2024-"), ["2024-05-06"], ["2023-05-06", "2024-99-99"]
    ),
)

_NUMBERS = (
    Probe("minimum", "integer", _integer(minimum=3), [3, 4, 10, 29, 10**20], [2, 0, -3, -(10**20)]),
    Probe("minimum", "negative integer", _integer(minimum=-12), [-12, -2, 0, 5, 13], [-13, -20, -100]),
    Probe("maximum", "integer", _integer(maximum=31), [31, 4, 30, 0, -50, -(10**20)], [32, 40, 100, 10**20]),
    Probe(
        "maximum", "and minimum, integer", _integer(minimum=-5, maximum=12), [-5, 0, 9, 10, 12], [-6, 13, -12, 50, 100]
    ),
    Probe("maximum", "and minimum, equal", _integer(minimum=7, maximum=7), [7], [6, 8, 77, -7]),
    Probe(
        "maximum", "beyond 64 bits", _integer(minimum=0, maximum=10**25), [0, 2**64, 10**25], [-1, 10**25 + 1, 10**26]
    ),
    Probe("exclusiveMinimum", "integer", _integer(exclusiveMinimum=3), [4, 30], [3, 2, -4]),
    Probe("exclusiveMaximum", "integer", _integer(exclusiveMaximum=3), [2, 0, -30], [3, 4, 20]),
    Probe("minimum", "decimal", _number(minimum=0.5), [0.5, 0.75, 0.51, 1, 2.25, 100], [0.25, 0.49, 0, -0.5, -1]),
    Probe("maximum", "decimal", _number(maximum=2.75), [2.75, 2.7, 2, 0.125, -3.5], [2.76, 2.751, 3, 20]),
    Probe(
        "maximum",
        "and minimum, decimal",
        _number(minimum=0, maximum=1),
        [0, 1, 0.5, 0.001, 1.0],
        [1.5, -0.1, 1.0001, 2],
    ),
    Probe(
        "maximum", "and minimum, negative", _number(minimum=-90, maximum=-1.5), [-90, -1.5, -89.99], [-90.01, -1, 0, 2]
    ),
    Probe("minimum", "decimal bound on integers", _integer(minimum=1.5, maximum=3.5), [2, 3], [1, 4, 0]),
    Probe("minimum", "with exponents", _number(minimum=0), [1e-05, 1e16, 2.5e-07], [-1e-05, -1e16]),
    Probe("exclusiveMinimum", "decimal", _number(exclusiveMinimum=0), [0.001, 0.5, 1, 10], [0, 0.0, -0.5, -1]),
    Probe("exclusiveMaximum", "decimal", _number(exclusiveMaximum=1), [0.999, 0, -2.5], [1, 1.0, 1.5, 10]),
    Probe("multipleOf", "integer", _integer(multipleOf=3), [0, 3, -6, 12, 300], [1, -4, 10, 301]),
    Probe("multipleOf", "large", _integer(multipleOf=250), [0, 250, -500, 12750], [1, 125, 300, 12751]),
    Probe("multipleOf", "decimal 0.25", _number(multipleOf=0.25), [0, 0.25, 1.5, 3, -0.75], [0.3, 1.1, 0.125, 0.26]),
    Probe("multipleOf", "decimal 0.01", _number(multipleOf=0.01), [0, 0.25, 12.5, 3, -0.5], [0.125, 0.001, 2.5001]),
    Probe("multipleOf", "an integer, of numbers", _number(multipleOf=5), [0, 5, 10.0, -15], [1, 2.5, 5.5]),
    Probe("multipleOf", "with range", _integer(multipleOf=5, minimum=10, maximum=30), [10, 25, 30], [5, 12, 35, 0, 31]),
    Probe(
        "multipleOf",
        "decimal with range",
        _number(multipleOf=0.5, exclusiveMinimum=0, maximum=2),
        [0.5, 1, 2],
        [0, 0.25, 2.5],
    ),
)

_COMBINED = (
    Probe("anyOf", "", {"anyOf": [_STRING, _INTEGER]}, ["a", "", 1], [1.5, None, True, []]),
    Probe("anyOf", "with null", {"anyOf": [_INTEGER, _NULL], "default": None}, [1, None], ["1", False, 0.5]),
    Probe(
        "anyOf",
        "objects",
        {"anyOf": [_record({"a": _INTEGER}, "a"), _record({"b": _STRING}, "b")]},
        [{"a": 1}, {"b": "x"}],
        [{}, {"a": "x"}, {"b": 1}, {"a": 1, "b": "x"}],
    ),
    Probe(
        "anyOf",
        "objects that begin alike",
        {"anyOf": [_record({"a": _INTEGER, "b": _STRING}, "a", "b"), _record({"a": _STRING, "c": _INTEGER}, "a", "c")]},
        [{"a": 1, "b": "x"}, {"a": "x", "c": 1}],
        [{"a": 1, "c": 1}, {"a": "x", "b": "x"}, {"a": 1}],
    ),
    Probe("anyOf", "with siblings", _text(anyOf=[{"maxLength": 2}, {"pattern": "^x"}]), ["", "ab", "xyz"], ["abc", 1]),
    Probe(
        "anyOf",
        "of constants",
        {"anyOf": [{"const": "a"}, {"const": 1}, {"enum": ["b", "c"]}]},
        ["a", 1, "c"],
        ["d", 2],
    ),
    Probe("oneOf", "disjoint", {"oneOf": [_STRING, _array(_STRING)]}, ["a", ["a"], []], [1, [1], None]),
    Probe(
        "oneOf",
        "told apart by a constant",
        {
            "oneOf": [
                _record({"kind": {"const": "circle"}, "radius": _number()}, "kind", "radius"),
                _record({"kind": {"const": "square"}, "side": _number()}, "kind", "side"),
            ]
        },
        [{"kind": "circle", "radius": 1.5}, {"kind": "square", "side": 2}],
        [{"kind": "circle", "side": 1}, {"kind": "line"}, {"kind": "circle"}, {}],
    ),
    Probe("oneOf", "overlapping", _integer(oneOf=[{"minimum": 5}, {"maximum": 10}]), [3, 12], [7, 5, 10]),
    Probe(
        "oneOf", "overlapping enums", {"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ["a", "c"], ["b", "d"]
    ),
    Probe(
        "allOf",
        "merges properties",
        {
            "type": "object",
            "allOf": [
                {"properties": {"a": _INTEGER}, "required": ["a"]},
                {"properties": {"b": _STRING}, "required": ["b"]},
            ],
        },
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}, {"a": "x", "b": "x"}, {"a": 1, "b": 1}],
    ),
    Probe("allOf", "merges bounds", {"allOf": [_integer(minimum=3), {"maximum": 5}]}, [3, 5], [2, 6, "x"]),
    Probe(
        "allOf", "merges patterns", _text(allOf=[{"pattern": "a"}, {"pattern": "b"}]), ["ab", "xbya"], ["a", "b", ""]
    ),
    Probe(
        "allOf",
        "merges enums",
        {"allOf": [{"enum": ["a", "b", "c"]}, {"enum": ["b", "c", "d"]}]},
        ["b", "c"],
        ["a", "d"],
    ),
    Probe("allOf", "of one", {"allOf": [_text(maxLength=2)], "description": "short"}, ["", "ab"], ["abc", 1]),
    Probe("not", "a type", {"not": _STRING}, [1, None, [], {}], ["a", ""]),
    Probe("not", "a constant", _text(**{"not": {"const": "admin"}}), ["a", "adm", "admins", ""], ["admin"]),
    Probe("not", "an enum", _integer(**{"not": {"enum": [0, 13]}}), [1, 12, 130, -13], [0, 13]),
    Probe("not", "a pattern", _text(**{"not": {"pattern": "^_"}}), ["a", "", "a_"], ["_", "_a"]),
    Probe(
        "not",
        "required",
        _record({"a": _INTEGER, "b": _INTEGER}, **{"not": {"required": ["a", "b"]}}),
        [{}, {"a": 1}, {"b": 1}],
        [{"a": 1, "b": 1}],
    ),
    Probe(
        "if",
        "then and else",
        _record(
            {"country": {"enum": ["US", "NL"]}, "code": _STRING},
            "country",
            "code",
            **{
                "if": {"properties": {"country": {"const": "US"}}},
                "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
                "else": {"properties": {"code": {"pattern": "^[0-9]{4}[A-Z]{2}$"}}},
            },
        ),
        [{"country": "US", "code": "12345"}, {"country": "NL", "code": "1234AB"}],
        [{"country": "US", "code": "1234AB"}, {"country": "NL", "code": "12345"}],
    ),
    Probe(
        "if",
        "then required",
        _record(
            {"mode": {"enum": ["air", "sea"]}, "port": _STRING},
            "mode",
            **{"if": {"properties": {"mode": {"const": "sea"}}}, "then": {"required": ["port"]}},
        ),
        [{"mode": "air"}, {"mode": "air", "port": "x"}, {"mode": "sea", "port": "x"}],
        [{"mode": "sea"}],
    ),
    Probe(
        "if", "of a scalar", _integer(**{"if": {"minimum": 10}, "then": {"multipleOf": 10}}), [1, 9, 10, 120], [11, 125]
    ),
)

_CHAIN = {
    "type": "object",
    "properties": {"name": _STRING, "next": {"$ref": "#/$defs/chain"}},
    "required": ["name"],
    "additionalProperties": False,
}
_TREE = {
    "type": "object",
    "properties": {"n": _INTEGER, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["n", "children"],
    "additionalProperties": False,
}

_REFERENCES = (
    Probe(
        "$ref",
        "to $defs",
        _record({"from": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}}, "from", "to")
        | {"$defs": {"place": _record({"city": _STRING}, "city")}},
        [{"from": {"city": "a"}, "to": {"city": "b"}}],
        [{"from": {"city": "a"}, "to": {}}, {"from": "a", "to": "b"}],
        whole=True,
    ),
    Probe(
        "$ref",
        "with siblings",
        _record({"code": {"$ref": "#/$defs/code", "maxLength": 3}}, "code")
        | {"$defs": {"code": _text(pattern="^[a-z]+$")}},
        [{"code": "ab"}, {"code": "abc"}],
        [{"code": "abcd"}, {"code": "AB"}, {"code": ""}],
        whole=True,
    ),
    Probe(
        "$ref",
        "chained",
        _record({"a": {"$ref": "#/$defs/one"}}, "a")
        | {"$defs": {"one": {"$ref": "#/$defs/two"}, "two": {"enum": ["x", "y"]}}},
        [{"a": "x"}],
        [{"a": "z"}, {"a": None}],
        whole=True,
    ),
    Probe(
        "$ref",
        "recursive, chain",
        _record({"head": {"$ref": "#/$defs/chain"}}, "head") | {"$defs": {"chain": _CHAIN}},
        [{"head": {"name": "a"}}, {"head": {"name": "a", "next": {"name": "b", "next": {"name": "c"}}}}],
        [{"head": {}}, {"head": {"name": "a", "next": None}}, {"head": {"name": "a", "next": {"name": 1}}}],
        whole=True,
    ),
    Probe(
        "$ref",
        "recursive, tree",
        _record({"root": {"$ref": "#/$defs/tree"}}, "root") | {"$defs": {"tree": _TREE}},
        [
            {"root": {"n": 1, "children": []}},
            {
                "root": {
                    "n": 1,
                    "children": [{"n": 2, "children": []}, {"n": 3, "children": [{"n": 4, "children": []}]}],
                }
            },
        ],
        [{"root": {"n": 1}}, {"root": {"n": 1, "children": [2]}}, {"root": {"n": 1, "children": [{"n": 2}]}}],
        whole=True,
    ),
    Probe(
        "$ref",
        "to the root",
        _record({"a": _INTEGER, "more": {"$ref": "#"}}, "a"),
        [{"a": 1}, {"a": 1, "more": {"a": 2}}, {"a": 1, "more": {"a": 2, "more": {"a": 3}}}],
        [{"a": 1, "more": {}}, {"a": 1, "more": {"a": "x"}}, {}],
        whole=True,
    ),
    Probe(
        "$ref",
        "by pointer",
        _record({"a/b": {"enum": ["x", "y"]}, "c": {"$ref": "#/properties/a~1b"}}, "a/b", "c"),
        [{"a/b": "x", "c": "y"}],
        [{"a/b": "x", "c": "z"}],
        whole=True,
    ),
    Probe(
        "$anchor",
        "",
        _record({"a": {"$ref": "#small"}}, "a")
        | {"$defs": {"n": {"$anchor": "small", "type": "integer", "maximum": 9}}},
        [{"a": 1}],
        [{"a": 10}, {"a": "x"}],
        whole=True,
    ),
    Probe(
        "definitions",
        "",
        _record({"a": {"$ref": "#/definitions/unit"}}, "a") | {"definitions": {"unit": _text(enum=["C", "F"])}},
        [{"a": "C"}],
        [{"a": "K"}],
        whole=True,
    ),
)

_DIALECTS = (
    Probe(
        "nullable", "OpenAPI", _text(nullable=True), ["a", "", None], [1, False], standard={"type": ["string", "null"]}
    ),
    Probe("nullable", "false", _text(nullable=False), ["a"], [None, 1], standard=_STRING),
    Probe(
        "nullable",
        "with enum",
        _text(enum=["a", "b"], nullable=True),
        ["a", "b", None],
        ["c", 1],
        standard={"enum": ["a", "b", None]},
    ),
    Probe(
        "nullable",
        "array",
        _array(_INTEGER, nullable=True),
        [[1], [], None],
        [["a"], 1],
        standard={"type": ["array", "null"], "items": _INTEGER},
    ),
    Probe(
        "nullable",
        "object",
        {"type": "object", "properties": {"a": _INTEGER}, "required": ["a"], "nullable": True},
        [{"a": 1}, None],
        [{}, {"a": "x"}, 1],
        standard={"type": ["object", "null"], "properties": {"a": _INTEGER}, "required": ["a"]},
    ),
    Probe(
        "type",
        "OpenAI strict tool",
        _record({"city": _STRING, "unit": {"type": ["string", "null"], "enum": ["C", "F", None]}}, "city", "unit"),
        [{"city": "x", "unit": "C"}, {"city": "x", "unit": None}],
        [{"city": "x"}, {"city": "x", "unit": "K"}],
        whole=True,
    ),
    Probe(
        "type",
        "pydantic model",
        {
            "$defs": {"Size": {"enum": ["S", "M"], "title": "Size", "type": "string"}},
            "properties": {
                "size": {"$ref": "#/$defs/Size"},
                "tags": {"default": [], "items": {"type": "string"}, "title": "Tags", "type": "array"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "Note"},
            },
            "required": ["size"],
            "title": "Order",
            "type": "object",
        },
        [{"size": "S"}, {"size": "M", "tags": ["a"]}, {"size": "S", "note": "x"}],
        [{}, {"size": "L"}, {"size": "S", "tags": [1]}, {"size": "S", "note": 1}],
        whole=True,
    ),
    Probe(
        "type",
        "null where it may be left out",
        _record({"a": _INTEGER, "note": {"anyOf": [_STRING, _NULL], "default": None}}, "a"),
        [{"a": 1}, {"a": 1, "note": None}, {"a": 1, "note": "x"}],
        [{"a": 1, "note": 1}, {"note": None}],
        whole=True,
    ),
    Probe(
        "dict",
        "BFCL",
        {"type": "dict", "properties": {"a": _INTEGER}, "required": ["a"]},
        [{"a": 1}],
        [{}, {"a": "x"}, 1],
        standard={"type": "object", "properties": {"a": _INTEGER}, "required": ["a"]},
    ),
    Probe(
        "dict",
        "as the parameters",
        {"type": "dict", "properties": {"a": {"type": "float"}}, "required": ["a"]},
        [{"a": 1.5}],
        [{}, {"a": "x"}],
        whole=True,
        standard={"type": "object", "properties": {"a": _number()}, "required": ["a"]},
    ),
    Probe("float", "BFCL", {"type": "float"}, [1.5, -0.25, 2], ["1.5", None, True], standard=_number()),
    Probe(
        "tuple",
        "BFCL",
        {"type": "tuple", "items": _INTEGER},
        [[1, 2], []],
        [["a"], 1, "(1, 2)"],
        standard=_array(_INTEGER),
    ),
    Probe("any", "BFCL", {"type": "any"}, [None, 1, "a", [1], {"a": 1}], [], ["", "x"], standard={}),
    Probe("String", "Java", {"type": "String"}, ["a", ""], [1, None], standard=_STRING),
    Probe("HashMap", "Java", {"type": "HashMap"}, [{}, {"a": 1}], [[], "a"], standard={"type": "object"}),
    Probe(
        "ArrayList",
        "Java",
        {"type": "ArrayList", "items": {"type": "String"}},
        [[], ["a"]],
        [[1], {}, "a"],
        standard=_array(_STRING),
    ),
    Probe("long", "Java", {"type": "long"}, [1, 2**62], [1.5, "1"], standard=_INTEGER),
    Probe(
        "list", "Python", {"type": "list", "items": {"type": "int"}}, [[], [1]], [["a"], 1], standard=_array(_INTEGER)
    ),
    Probe("bool", "Python", {"type": "bool"}, [True, False], [1, "true"], standard={"type": "boolean"}),
    Probe("str", "Python", {"type": "str"}, ["a"], [1, None], standard=_STRING),
    Probe(
        "STRING",
        "Gemini",
        {"type": "OBJECT", "properties": {"a": {"type": "STRING"}}, "required": ["a"]},
        [{"a": "x"}],
        [{}, {"a": 1}],
        standard={"type": "object", "properties": {"a": _STRING}, "required": ["a"]},
    ),
    Probe(
        "type",
        "missing, with properties",
        {"properties": {"a": _INTEGER}, "required": ["a"]},
        [{"a": 1}],
        [{}, {"a": "x"}],
    ),
    Probe(
        "type",
        "missing, with properties, of the parameters",
        {"properties": {"a": _INTEGER}, "required": ["a"]},
        [{"a": 1}],
        [{}, {"a": "x"}],
        whole=True,
    ),
    Probe("type", "missing, with items", {"items": _INTEGER}, [[], [1]], [["a"]]),
    Probe("type", "missing, with maxLength", {"maxLength": 2}, ["", "ab"], ["abc"]),
    Probe("type", "missing, with pattern", {"pattern": "^[a-z]+$"}, ["ab"], ["", "A"]),
    Probe("type", "missing, with minimum", {"minimum": 3}, [3, 4.5], [2, 2.5]),
    Probe(
        "required",
        "null",
        {"type": "object", "properties": {"a": _INTEGER}, "required": None},
        [{}, {"a": 1}],
        [{"a": "x"}],
        standard={"type": "object", "properties": {"a": _INTEGER}},
    ),
    Probe(
        "required",
        "true in the property (draft 3)",
        {"type": "object", "properties": {"a": _integer(required=True), "b": _STRING}},
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{}, {"b": "x"}],
        standard={"type": "object", "properties": {"a": _INTEGER, "b": _STRING}, "required": ["a"]},
    ),
    Probe(
        "exclusiveMinimum",
        "true (draft 4)",
        _integer(minimum=3, exclusiveMinimum=True),
        [4, 10],
        [3, 2],
        standard=_integer(exclusiveMinimum=3),
    ),
    Probe(
        "items",
        "list (draft 7)",
        _array([_STRING, _INTEGER], minItems=2),
        [["a", 1], ["a", 1, None]],
        [[1, "a"], ["a"]],
        standard=_array(prefixItems=[_STRING, _INTEGER], minItems=2),
    ),
    Probe(
        "additionalItems",
        "false (draft 7)",
        _array([_STRING, _INTEGER], additionalItems=False),
        [["a", 1], ["a"], []],
        [[1], ["a", 1, 2]],
        standard=_array(prefixItems=[_STRING, _INTEGER], items=False),
    ),
    Probe(
        "dependencies",
        "names (draft 7)",
        _record({"a": _INTEGER, "b": _INTEGER}, dependencies={"a": ["b"]}),
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
        standard=_record({"a": _INTEGER, "b": _INTEGER}, dependentRequired={"a": ["b"]}),
    ),
)

SECTIONS: dict[str, tuple[Probe, ...]] = {
    "Types": _TYPES,
    "Closed sets": _CLOSED,
    "Objects": _OBJECTS,
    "Arrays": _ARRAYS,
    "Strings": _STRINGS,
    "Formats": _FORMATS,
    "Numbers": _NUMBERS,
    "Combinations and conditions": _COMBINED,
    "References": _REFERENCES,
    "Dialects": _DIALECTS,
}
"""The probes under the headings of the coverage table."""

PROBES: tuple[Probe, ...] = tuple(probe for probes in SECTIONS.values() for probe in probes)
