"""The layout that a drafter fills: a call with every property present, every array at its budget, every branch open.

Takes a scaffold, gives fixed texts and slots in reading order, and reads values out of them and back in. Pure Python:
no tokens, no tensors.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .schema_algebra import escape_pointer
from .schema_scaffold import (
    MAX_LEAVES,
    ArrayNode,
    Leaf,
    Link,
    Node,
    ObjectNode,
    Scaffold,
    UnionNode,
    branch_of,
    fits,
    item_of,
)

SlotRole = Literal["value", "key", "presence", "length", "branch"]

# How often a drafter follows a recursive link, and how many freely named properties it lays out.
LINK_BUDGET = 2
EXTRA_BUDGET = 2

Conditions = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class DraftSlot:
    """One place of the layout that a drafter fills.

    Args:
        path: JSON pointer of the value inside the arguments, for example `/days/0`.
        role: `"value"`, the `"key"` of a freely named property, or a structure decision: `"presence"` of an optional
            property, `"length"` of an array or of the freely named properties, `"branch"` of a union.
        leaf: kind and choices of its text.
        alive_if: triples (index of an earlier structure slot, low, high): this slot matters only if each of them
            decides on a number in its range (present counts as 1, absent as 0; branches count from 0).
        open_ended: a length whose largest choice is the budget and not the schema's maximum.
    """

    path: str
    role: SlotRole
    leaf: Leaf
    alive_if: Conditions
    open_ended: bool = False

    def decision(self, text: str) -> int:
        """The number that a structure slot's text decides on."""
        return self.leaf.choices.index(text) if self.role in ("branch", "presence") else int(text)


@dataclass(frozen=True)
class Observed:
    """What is known of a slot's text: all of it, or its beginning."""

    text: str
    complete: bool


# A decision needs no slot where there is only one choice; its number is then None.


@dataclass(frozen=True)
class _LeafItem:
    slot: int
    leaf: Leaf


@dataclass(frozen=True)
class _ObjectItem:
    node: ObjectNode
    entries: tuple[tuple[str, int | None, "_Item"], ...]
    count: int | None = None
    extras: tuple[tuple[_LeafItem, "_Item"], ...] = ()


@dataclass(frozen=True)
class _ArrayItem:
    node: ArrayNode
    low: int
    length: int | None
    items: tuple["_Item", ...]


@dataclass(frozen=True)
class _UnionItem:
    node: UnionNode
    branch: int | None
    branches: tuple[Node, ...]
    items: tuple["_Item", ...]


_Item = _LeafItem | _ObjectItem | _ArrayItem | _UnionItem


@dataclass(frozen=True)
class Layout:
    """Fixed texts and slots of a call in reading order.

    Args:
        scaffold: what it lays out.
        array_budget: items laid out per array, more where the schema asks for more.
        pieces: fixed texts, and ints that index `slots`.
        slots: the places to fill.
        root: where each slot belongs.
    """

    scaffold: Scaffold
    array_budget: int
    pieces: tuple[str | int, ...]
    slots: tuple[DraftSlot, ...]
    root: _Item

    def assemble(self, texts: Sequence[str]) -> dict[str, Any]:
        """The arguments that a text for every slot stands for.

        Args:
            texts: one a slot, in the order of `slots`: raw string contents for string slots, JSON text for the
                others; texts of slots that are not alive are not read.

        Returns:
            The arguments, properties in schema order.
        """
        if len(texts) != len(self.slots):
            raise ValueError(f"{len(texts)} texts for {len(self.slots)} slots: give one a slot.")
        return _Reader(self, texts).value(self.root)

    def observe(self, written: str) -> tuple[list[Observed | None], bool]:
        """What the beginning of the arguments' JSON text says about the slots.

        Args:
            written: text from the opening brace on, as `json.dumps` writes it; may end anywhere.

        Returns:
            One entry a slot, None where nothing is known; and whether the text went on with something that is not laid
            out, so that what follows it could not be read.
        """
        observer = _Observer(self, written)
        beyond = not observer.read(self.root) and not observer.exhausted
        return observer.known, beyond

    def texts(self, arguments: Mapping[str, Any]) -> list[str | None]:
        """The inverse of `assemble`: the text of every slot, None for slots that are not alive.

        What goes beyond the budgets (items of arrays, freely named properties) is cut to them: the slot then decides
        on the budget itself, which readers take as "at least".

        Raises:
            ValueError: the arguments do not fit what is laid out.
        """
        writer = _Writer(self)
        writer.write(self.root, "", arguments)
        return writer.texts


def draft_layout(scaffold: Scaffold, array_budget: int) -> Layout | None:
    """Lay a scaffold out for a drafter.

    Args:
        scaffold: the compiled tool.
        array_budget: items laid out per array, at least 1.

    Returns:
        The layout, or None when it would need more than `MAX_LEAVES` slots, or many times as many containers, or holds
        a required value that cannot be drafted.
    """
    builder = _LayoutBuilder(array_budget)
    try:
        root = builder.item(scaffold.root, "", (), 0)
    except _TooLarge:
        return None
    if root is None:
        return None
    return Layout(scaffold, array_budget, tuple(builder.pieces), tuple(builder.slots), root)


class _TooLarge(Exception):
    pass


class _LayoutBuilder:
    def __init__(self, array_budget: int) -> None:
        self.array_budget = array_budget
        self.pieces: list[str | int] = []
        self.slots: list[DraftSlot] = []
        self.nodes = 0
        self.draftable_at: dict[tuple[int, int], bool] = {}

    def fixed(self, text: str) -> None:
        if self.pieces and isinstance(self.pieces[-1], str):
            self.pieces[-1] += text
        else:
            self.pieces.append(text)

    def slot(self, path: str, role: SlotRole, leaf: Leaf, alive_if: Conditions, open_ended: bool = False) -> int:
        if len(self.slots) >= MAX_LEAVES:
            raise _TooLarge
        self.pieces.append(len(self.slots))
        self.slots.append(DraftSlot(path, role, leaf, alive_if, open_ended))
        return len(self.slots) - 1

    def decision(
        self, path: str, role: SlotRole, choices: Sequence[str], alive_if: Conditions, open_ended: bool = False
    ) -> int | None:
        """A structure slot, where there is something to decide."""
        if len(choices) < 2:
            return None
        return self.slot(path, role, Leaf("choice", path, False, tuple(choices)), alive_if, open_ended)

    def draftable(self, node: Node, links: int) -> bool:
        """Whether a node can be laid out: it needs no guided value, and no links beyond the budget."""
        key = (id(node), links)
        if key not in self.draftable_at:
            self.draftable_at[key] = self._draftable(node, links)
        return self.draftable_at[key]

    def _draftable(self, node: Node, links: int) -> bool:
        if isinstance(node, Leaf):
            return node.kind != "guided"
        if isinstance(node, Link):
            return node.target is not None and links < LINK_BUDGET and self.draftable(node.target, links + 1)
        if isinstance(node, UnionNode):
            return any(self.draftable(branch, links) for branch in node.branches)
        if isinstance(node, ObjectNode):
            return all(self.draftable(entry.node, links) for entry in node.properties if entry.required)
        needed = _items_of(node, node.min_items)
        return all(inner is not None and self.draftable(inner, links) for inner in needed)

    def item(self, node: Node, path: str, alive_if: Conditions, links: int) -> _Item | None:
        self.nodes += 1
        # Containers without a slot (arrays of a fixed length of empty objects) cost text and time all the same.
        if self.nodes > 4 * MAX_LEAVES:
            raise _TooLarge
        if not self.draftable(node, links):
            return None
        if isinstance(node, Leaf):
            return self.leaf(node, path, "value", alive_if)
        if isinstance(node, Link):
            assert node.target is not None
            return self.item(node.target, path, alive_if, links + 1)
        if isinstance(node, UnionNode):
            return self.union(node, path, alive_if, links)
        if isinstance(node, ObjectNode):
            return self.object(node, path, alive_if, links)
        return self.array(node, path, alive_if, links)

    def leaf(self, leaf: Leaf, path: str, role: SlotRole, alive_if: Conditions) -> _LeafItem:
        quote = '"' if leaf.quoted else ""
        self.fixed(quote)
        slot = self.slot(path, role, leaf, alive_if)
        self.fixed(quote)
        return _LeafItem(slot, leaf)

    def union(self, node: UnionNode, path: str, alive_if: Conditions, links: int) -> _UnionItem:
        branches = tuple(branch for branch in node.branches if self.draftable(branch, links))
        branch = self.decision(path, "branch", _labels(branches), alive_if)
        items = []
        for index, inner in enumerate(branches):
            alive = alive_if if branch is None else (*alive_if, (branch, index, index))
            item = self.item(inner, path, alive, links)
            assert item is not None, "draftable branches can be laid out"
            items.append(item)
        return _UnionItem(node, branch, branches, tuple(items))

    def object(self, node: ObjectNode, path: str, alive_if: Conditions, links: int) -> _ObjectItem:
        self.fixed("{")
        entries: list[tuple[str, int | None, _Item]] = []
        for entry in node.properties:
            if not self.draftable(entry.node, links):
                continue
            inner, alive, presence = f"{path}/{escape_pointer(entry.name)}", alive_if, None
            self.fixed(", " if entries else "")
            if not entry.required:
                presence = self.decision(inner, "presence", _PRESENCE, alive_if)
                assert presence is not None
                alive = (*alive_if, (presence, 1, 1))
            self.fixed(f"{json.dumps(entry.name, ensure_ascii=False)}: ")
            item = self.item(entry.node, inner, alive, links)
            assert item is not None, "draftable properties can be laid out"
            entries.append((entry.name, presence, item))
        count, extras = self.extras(node, path, alive_if, links, bool(entries))
        self.fixed("}")
        return _ObjectItem(node, tuple(entries), count, extras)

    def extras(
        self, node: ObjectNode, path: str, alive_if: Conditions, links: int, filled: bool
    ) -> tuple[int | None, tuple[tuple[_LeafItem, _Item], ...]]:
        extra = next((extra for extra in node.extras if self.draftable(extra.node, links)), None)
        if extra is None:
            return None, ()
        count = self.decision(path, "length", [str(n) for n in range(EXTRA_BUDGET + 1)], alive_if, open_ended=True)
        assert count is not None
        laid_out = []
        for index in range(EXTRA_BUDGET):
            alive = (*alive_if, (count, index + 1, EXTRA_BUDGET))
            self.fixed(", " if filled or index else "")
            key = self.leaf(extra.key, path, "key", alive)
            self.fixed(": ")
            item = self.item(extra.node, f"{path}/*", alive, links)
            assert item is not None, "draftable extras can be laid out"
            laid_out.append((key, item))
        return count, tuple(laid_out)

    def array(self, node: ArrayNode, path: str, alive_if: Conditions, links: int) -> _ArrayItem:
        most = max(self.array_budget, node.min_items)
        inner = []
        for one in _items_of(node, most if node.max_items is None else min(most, node.max_items)):
            if one is None or not self.draftable(one, links):
                break
            inner.append(one)
        counts = range(node.min_items, len(inner) + 1)
        self.fixed("[")
        more = node.max_items is None or node.max_items > counts[-1]
        length = self.decision(path, "length", [str(count) for count in counts], alive_if, open_ended=more)
        items = []
        for index, one in enumerate(inner):
            self.fixed(", " if index else "")
            alive = alive_if
            if length is not None and index >= node.min_items:
                alive = (*alive_if, (length, index + 1, counts[-1]))
            item = self.item(one, f"{path}/{index}", alive, links)
            assert item is not None, "draftable items can be laid out"
            items.append(item)
        self.fixed("]")
        return _ArrayItem(node, node.min_items, length, tuple(items))


# Index 0 decides on absence.
_PRESENCE = ("false", "true")


def _items_of(node: ArrayNode, count: int) -> list[Node | None]:
    """Nodes of the first items of an array: the prefix, as many matches as it needs, and then any."""
    behind = node.item if node.item is not None else node.match
    found: list[Node | None] = []
    for index in range(count):
        if index < len(node.prefix):
            found.append(node.prefix[index])
        else:
            found.append(node.match if index < len(node.prefix) + node.min_matches else behind)
    return found


def _labels(branches: Sequence[Node]) -> list[str]:
    """A name for each branch of a union: its kind, numbered where several are alike."""
    names: list[str] = []
    for branch in branches:
        while isinstance(branch, Link) and branch.target is not None:
            branch = branch.target
        name = {ObjectNode: "object", ArrayNode: "array"}.get(type(branch), "any")
        if isinstance(branch, Leaf):
            name = "null" if branch.choices == ("null",) else branch.kind
        number = sum(other.split(" ")[0] == name for other in names)
        names.append(f"{name} {number + 1}" if number else name)
    return names


class _Reader:
    """Reads slot texts back into a value."""

    def __init__(self, layout: Layout, texts: Sequence[str]) -> None:
        self.slots = layout.slots
        self.texts = texts

    def decided(self, slot: int) -> int:
        return self.slots[slot].decision(self.texts[slot])

    def value(self, item: _Item) -> Any:
        if isinstance(item, _LeafItem):
            text = self.texts[item.slot]
            return text if item.leaf.kind == "string" else item.leaf.value(text)
        if isinstance(item, _UnionItem):
            return self.value(item.items[0 if item.branch is None else self.decided(item.branch)])
        if isinstance(item, _ArrayItem):
            count = len(item.items) if item.length is None else self.decided(item.length)
            return [self.value(inner) for inner in item.items[:count]]
        result = {
            name: self.value(inner)
            for name, presence, inner in item.entries
            if presence is None or self.decided(presence) == 1
        }
        for key, inner in item.extras[: self.decided(item.count) if item.count is not None else 0]:
            result.setdefault(self.value(key), self.value(inner))
        return result


class _Writer:
    """Writes a value as slot texts."""

    def __init__(self, layout: Layout) -> None:
        self.slots = layout.slots
        self.texts: list[str | None] = [None] * len(layout.slots)

    def write(self, item: _Item, path: str, value: Any) -> None:
        if isinstance(item, _LeafItem):
            if not fits(item.leaf, value):
                raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold.")
            self.texts[item.slot] = value if item.leaf.kind == "string" else item.leaf.text(value)
        elif isinstance(item, _UnionItem):
            self.union(item, path, value)
        elif isinstance(item, _ObjectItem):
            self.object(item, path, value)
        else:
            self.array(item, path, value)

    def union(self, item: _UnionItem, path: str, value: Any) -> None:
        branch = branch_of(item.node, value)
        if branch not in item.branches:
            raise ValueError(f"{value!r} at {path or '/'} fits no branch that is laid out.")
        index = item.branches.index(branch)
        if item.branch is not None:
            self.texts[item.branch] = self.slots[item.branch].leaf.choices[index]
        self.write(item.items[index], path, value)

    def object(self, item: _ObjectItem, path: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's object.")
        names = {name for name, _, _ in item.entries}
        further = [name for name in value if name not in names]
        if further and item.count is None:
            raise ValueError(f"{further[0]!r} at {path or '/'} is not laid out.")
        for name, presence, inner in item.entries:
            if presence is not None:
                self.texts[presence] = _PRESENCE[name in value]
            elif name not in value:
                raise ValueError(f"{path}/{name} is required and missing.")
            if name in value:
                self.write(inner, f"{path}/{name}", value[name])
        if item.count is not None:
            self.texts[item.count] = str(min(len(further), len(item.extras)))
        for name, (key, inner) in zip(further, item.extras, strict=False):
            self.write(key, path, name)
            self.write(inner, f"{path}/{name}", value[name])

    def array(self, item: _ArrayItem, path: str, value: Any) -> None:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < item.low:
            raise ValueError(f"{value!r} at {path or '/'} does not fit the scaffold's array.")
        if item.length is not None:
            self.texts[item.length] = str(min(len(value), len(item.items)))
        for index, (inner, one) in enumerate(zip(item.items, value, strict=False)):
            if item_of(item.node, index, one) is None:
                raise ValueError(f"{one!r} at {path}/{index} does not fit the scaffold's array.")
            self.write(inner, f"{path}/{index}", one)


_NUMBER = re.compile(r"[-+.0-9eE]*")


class _Observer:
    """Reads as much of a partly written value as there is; each step tells whether the text fits so far."""

    def __init__(self, layout: Layout, written: str) -> None:
        self.slots = layout.slots
        self.written = written
        self.place = 0
        self.known: list[Observed | None] = [None] * len(layout.slots)
        self.exhausted = False

    def literal(self, text: str) -> bool:
        """Read a fixed text; sets `exhausted` where what is left could still become it."""
        if self.written.startswith(text, self.place):
            self.place += len(text)
            return True
        self.exhausted = self.exhausted or text.startswith(self.written[self.place :])
        return False

    def read(self, item: _Item) -> bool:
        """Read one item; False where the text ends inside it (then `exhausted`) or is none of it."""
        if isinstance(item, _LeafItem):
            return self.leaf(item)
        if isinstance(item, _UnionItem):
            return self.union(item)
        if isinstance(item, _ObjectItem):
            return self.object(item)
        return self.array(item)

    def decide(self, slot: int | None, index: int) -> None:
        if slot is not None:
            leaf = self.slots[slot].leaf
            text = leaf.choices[index] if self.slots[slot].role != "length" else str(index)
            if text in leaf.choices:
                self.known[slot] = Observed(text, True)

    def union(self, item: _UnionItem) -> bool:
        if self.place >= len(self.written):
            self.exhausted = True
            return False
        start, before = self.place, list(self.known)
        viable = []
        for index, inner in enumerate(item.items):
            self.place, self.known, self.exhausted = start, list(before), False
            complete = self.read(inner)
            if complete or self.exhausted:
                viable.append((index, complete, self.place, self.known))
            if complete:
                break  # as for whole values, the first branch that fits is the one
        self.exhausted = bool(viable) and not viable[-1][1]
        if len(viable) != 1 and self.exhausted:
            self.known = before  # what is written does not tell the branches apart
            return False
        if not viable:
            self.place, self.known = start, before
            return False
        index, complete, self.place, self.known = viable[-1]
        self.decide(item.branch, index)
        return complete

    def object(self, item: _ObjectItem) -> bool:
        if not self.literal("{"):
            return False
        lead, absent = "", list[int]()
        for name, presence, inner in item.entries:
            present = self.literal(f"{lead}{json.dumps(name, ensure_ascii=False)}: ")
            if self.exhausted or (not present and presence is None):
                return False
            if presence is not None:
                self.decide(presence, int(present))
                absent.append(presence)
            if present:
                lead, absent = ", ", []
                if not self.read(inner):
                    return False
        for index, (key, inner) in enumerate(item.extras):
            if self.written.startswith("}", self.place):
                self.decide(item.count, index)
                break
            if not self.literal(lead):
                return False
            lead = ", "
            if not (self.read(key) and self.literal(": ") and self.read(inner)):
                return False
        complete = self.end("}", item.count, len(item.extras))
        if not complete and not self.exhausted:
            # Something follows that is not laid out, and those that did not match may stand behind it.
            for presence in absent:
                self.known[presence] = None
        return complete

    def array(self, item: _ArrayItem) -> bool:
        if not self.literal("["):
            return False
        for index, inner in enumerate(item.items):
            if index >= item.low and self.written.startswith("]", self.place):
                self.place += 1
                self.decide(item.length, index)
                return True
            if index and not self.literal(", "):
                return False
            if not self.read(inner):
                return False
        return self.end("]", item.length, len(item.items))

    def end(self, bracket: str, slot: int | None, most: int) -> bool:
        """Read the end of a container whose length is decided by a slot."""
        if not self.literal(bracket):
            return False
        if slot is not None and self.known[slot] is None:
            self.decide(slot, most)
        return True

    def leaf(self, item: _LeafItem) -> bool:
        leaf = item.leaf
        if self.place >= len(self.written):
            self.exhausted = True
            return False
        if leaf.quoted and not self.literal('"'):
            return False
        seen = self.string(leaf) if leaf.quoted else self.plain(leaf)
        if seen is None:
            return False
        self.known[item.slot] = seen
        return seen.complete

    def string(self, leaf: Leaf) -> Observed | None:
        end = self.place
        while end < len(self.written) and self.written[end] != '"':
            end += 2 if self.written[end] == "\\" else 1
        text, complete = self.written[self.place : end], end < len(self.written)
        if leaf.kind == "string":
            text = _unescape(text)
            viable = leaf.max_length is None or len(text) <= leaf.max_length
            viable = viable and (leaf.automaton is None or leaf.automaton.viable(text.encode(), complete))
        else:
            viable = any(choice == text if complete else choice.startswith(text) for choice in leaf.choices)
        if not viable:
            return None
        self.place = end + 1
        self.exhausted = self.exhausted or not complete
        return Observed(text, complete)

    def plain(self, leaf: Leaf) -> Observed | None:
        rest = self.written[self.place :]
        if leaf.kind == "choice":
            # Only a delimiter behind it tells that a choice is whole: 1 may still become 10.
            whole = (choice for choice in leaf.choices if rest.startswith(tuple(choice + end for end in ",]}")))
            text = next(whole, rest)
            viable = text in leaf.choices or any(choice.startswith(rest) for choice in leaf.choices)
        else:
            text = _NUMBER.match(rest).group()  # type: ignore[union-attr]
            ended = len(text) < len(rest)
            viable = leaf.automaton is None or leaf.automaton.viable(text.encode(), ended)
        if not viable:
            return None
        self.place += len(text)
        self.exhausted = self.exhausted or self.place >= len(self.written)
        return Observed(text, not self.exhausted)


def _unescape(text: str) -> str:
    """The raw text of escaped string contents that may end inside an escape, which is then left out."""
    for cut in range(len(text), max(-1, len(text) - 7), -1):
        try:
            return json.loads(f'"{text[:cut]}"')
        except json.JSONDecodeError:
            continue
    return ""
