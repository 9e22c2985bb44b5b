"""Who imports whom: the plan of the package, read from the source.

    python -m tests.imports

prints parts, levels, dependencies, imports that run upward and cycles. A *part* is a folder of a
package, or a module beside the folders. Imports are read with `ast`, so those inside functions and
under TYPE_CHECKING count like any other: they too are dependencies that a reader has to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent

TIERS: tuple[tuple[str, ...], ...] = (
    ("version", "quant", "native"),
    ("config", "backend", "files"),
    ("kernels",),
    ("attention", "store"),
    ("layers", "placement", "passing"),
    ("memory", "calibration", "model_rope"),
    ("layer_entries",),
    ("serialization",),
    ("cache",),
    ("capturable", "calibrating"),
    ("graph", "allocating", "warming"),
    ("decoding",),
    ("rotorquant_hf",),
)
"""The tiers of `rotorquant_hf` from the ground up; the last is the package's own `__init__`.

A part imports only parts of lower tiers. Attention and store stand side by side: what the two
have in common, `PackedSpan`, is in `quant`.
"""

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Package:
    """The imports within one package.

    Attributes:
        name: the package.
        modules: imported modules of the package, by importing module.
    """

    name: str
    modules: Graph

    @cached_property
    def parts(self) -> Graph:
        """Imported parts, by importing part."""
        found: dict[str, set[str]] = {self.part(module): set() for module in self.modules}
        for module, imported in self.modules.items():
            here = self.part(module)
            found[here] |= {self.part(other) for other in imported} - {here}
        return {part: frozenset(others) for part, others in found.items()}

    def part(self, module: str) -> str:
        """The part of a module; of the package's own `__init__` the package's name."""
        return module.split(".")[1] if "." in module else module

    @cached_property
    def dependencies(self) -> set[tuple[str, str]]:
        """Pairs of parts of which the first imports the second."""
        return {(part, other) for part, others in self.parts.items() for other in others}

    def upward(self, tiers: Iterable[Iterable[str]]) -> set[tuple[str, str]]:
        """Dependencies that do not lead to a lower tier."""
        level = {part: i for i, parts in enumerate(tiers) for part in parts}
        return {(a, b) for a, b in self.dependencies if level[b] >= level[a]}


def read_package(folder: Path) -> Package:
    """Read the package in a folder."""
    files = {_module_name(path, folder): path for path in sorted(folder.rglob("*.py"))}
    modules = {
        name: frozenset(_imports(path, name, files.keys()) - {name}) for name, path in files.items()
    }
    return Package(folder.name, modules)


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


def cycles(graph: Graph) -> list[list[str]]:
    """The groups of two and more nodes that reach one another."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {
        frozenset({node} | {x for x in reach[node] if node in reach[x]})
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(graph: Graph, start: str) -> set[str]:
    """The nodes at the ends of the paths from a node, itself only if it is in a cycle."""
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

    Nodes of a cycle are on one level.
    """
    cycle = {node: group for group in cycles(graph) for node in group}
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            group = cycle.get(node, [node])
            below = {other for member in group for other in graph[member]} - set(group)
            height = 1 + max((level(other) for other in below), default=0)
            found.update(dict.fromkeys(group, height))
        return found[node]

    for node in graph:
        level(node)
    return found


def describe(package: Package, tiers: Iterable[Iterable[str]] | None = None) -> str:
    """What `python -m tests.imports` prints of one package."""
    height = levels(package.parts)
    upward = package.upward(tiers) if tiers is not None else _within(cycles(package.parts), package)
    lines = [
        f"{package.name}: {len(package.modules)} modules, {len(package.parts)} parts, "
        f"{max(height.values())} levels, {len(package.dependencies)} dependencies, "
        f"{len(upward)} upward, "
        f"{len(cycles(package.parts))} cycles of parts, {len(cycles(package.modules))} of modules"
    ]
    for part in sorted(package.parts, key=lambda part: (height[part], part)):
        others = sorted(package.parts[part], key=lambda other: (height[other], other))
        lines.append(f"  {height[part]:2} {part:<16} {' '.join(others)}".rstrip())
    lines += [f"  upward: {a} -> {b}" for a, b in sorted(upward)]
    lines += [f"  cycle: {' '.join(group)}" for group in cycles(package.parts)]
    lines += [f"  cycle of modules: {' '.join(group)}" for group in cycles(package.modules)]
    return "\n".join(lines)


def _within(groups: Iterable[Iterable[str]], package: Package) -> set[tuple[str, str]]:
    """The dependencies within cycles: without a written order, these are what runs upward."""
    return {
        (a, b) for group in groups for a, b in package.dependencies if a in group and b in group
    }


if __name__ == "__main__":
    print(describe(read_package(ROOT / "rotorquant_hf"), TIERS))
    print(describe(read_package(ROOT / "evals")))
