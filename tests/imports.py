"""Who imports whom: the plan of the house, read from the source.

    python -m tests.imports

prints rooms, levels, arrows, imports that run upward and circles. A *room* is a folder of a
package, or a module beside the folders. Imports are read with `ast`, so those inside functions and
under TYPE_CHECKING count like any other: they too are arrows that a reader has to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent

STOREYS: tuple[tuple[str, ...], ...] = (
    ("version", "quant", "native"),
    ("config", "backend", "files"),
    ("kernels",),
    ("attention", "store"),
    ("layers", "placement"),
    ("memory", "calibration", "model_rope"),
    ("layer_entries",),
    ("serialization",),
    ("cache",),
    ("capturable", "calibrating"),
    ("graph", "allocating", "warming"),
    ("decoding",),
    ("rotorquant_hf",),
)
"""The storeys of `rotorquant_hf` from the ground up; the last is the package's own `__init__`.

A room imports only rooms of lower storeys. Attention and store stand side by side: what the two
have in common, `PackedSpan`, is in `quant`.
"""

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class House:
    """The imports within one package.

    Attributes:
        name: the package.
        modules: imported modules of the package, by importing module.
    """

    name: str
    modules: Graph

    @cached_property
    def rooms(self) -> Graph:
        """Imported rooms, by importing room."""
        found: dict[str, set[str]] = {self.room(module): set() for module in self.modules}
        for module, imported in self.modules.items():
            here = self.room(module)
            found[here] |= {self.room(other) for other in imported} - {here}
        return {room: frozenset(others) for room, others in found.items()}

    def room(self, module: str) -> str:
        """The room of a module; of the package's own `__init__` the package's name."""
        return module.split(".")[1] if "." in module else module

    @cached_property
    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms of which the first imports the second."""
        return {(room, other) for room, others in self.rooms.items() for other in others}

    def upward(self, storeys: Iterable[Iterable[str]]) -> set[tuple[str, str]]:
        """Arrows that do not lead to a lower storey."""
        level = {room: i for i, rooms in enumerate(storeys) for room in rooms}
        return {(a, b) for a, b in self.arrows if level[b] >= level[a]}


def read_house(folder: Path) -> House:
    """Read the package in a folder."""
    files = {_module_name(path, folder): path for path in sorted(folder.rglob("*.py"))}
    modules = {
        name: frozenset(_imports(path, name, files.keys()) - {name}) for name, path in files.items()
    }
    return House(folder.name, modules)


def _module_name(path: Path, folder: Path) -> str:
    parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, name: str, modules: Iterable[str]) -> set[str]:
    """The modules among `modules` that a file imports, wherever in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    wanted: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # one dot is the package itself
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from a import b`: b is a module, or something that the module a has.
            names = {f"{base}.{alias.name}" for alias in node.names}
            wanted |= names & set(modules) or {base}
    return wanted & set(modules)


def circles(graph: Graph) -> list[list[str]]:
    """The groups of two and more nodes that reach one another."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {
        frozenset({node} | {x for x in reach[node] if node in reach[x]})
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    """The nodes at the ends of the paths from a node, itself only if it is in a circle."""
    found: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph[node]
    return found


def levels(graph: Graph) -> dict[str, int]:
    """The level of every node: 1 without imports, else one above the highest it imports.

    Nodes of a circle are on one level.
    """
    circle = {node: group for group in circles(graph) for node in group}
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            group = circle.get(node, [node])
            below = {other for member in group for other in graph[member]} - set(group)
            height = 1 + max((level(other) for other in below), default=0)
            found.update(dict.fromkeys(group, height))
        return found[node]

    for node in graph:
        level(node)
    return found


def describe(house: House, storeys: Iterable[Iterable[str]] | None = None) -> str:
    """What `python -m tests.imports` prints of one package."""
    height = levels(house.rooms)
    upward = house.upward(storeys) if storeys is not None else _within(circles(house.rooms), house)
    lines = [
        f"{house.name}: {len(house.modules)} modules, {len(house.rooms)} rooms, "
        f"{max(height.values())} levels, {len(house.arrows)} arrows, {len(upward)} upward, "
        f"{len(circles(house.rooms))} circles of rooms, {len(circles(house.modules))} of modules"
    ]
    for room in sorted(house.rooms, key=lambda room: (height[room], room)):
        others = sorted(house.rooms[room], key=lambda other: (height[other], other))
        lines.append(f"  {height[room]:2} {room:<16} {' '.join(others)}".rstrip())
    lines += [f"  upward: {a} -> {b}" for a, b in sorted(upward)]
    lines += [f"  circle: {' '.join(group)}" for group in circles(house.rooms)]
    lines += [f"  circle of modules: {' '.join(group)}" for group in circles(house.modules)]
    return "\n".join(lines)


def _within(groups: Iterable[Iterable[str]], house: House) -> set[tuple[str, str]]:
    """The arrows within circles: without a written order, these are what runs upward."""
    return {(a, b) for group in groups for a, b in house.arrows if a in group and b in group}


if __name__ == "__main__":
    print(describe(read_house(ROOT / "rotorquant_hf"), STOREYS))
    print(describe(read_house(ROOT / "evals")))
