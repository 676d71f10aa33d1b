"""Whatever a file imports from this repository is there, in a function too, where only a run would tell."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files() -> Iterator[Path]:
    for folder in ("gspo_dist", "tests", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def file_of(module: str) -> Path | None:
    """The file of a module of this repository. None: another project's, or a folder without code."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.cache
def bound(source: Path) -> set[str]:
    """Every name that the module itself binds, also under `if`, `try` and `with`."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(source.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return names


def missing(tree: ast.Module) -> list[str]:
    """What a file imports from this repository by name and does not get."""
    absent = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        source = file_of(node.module)
        if source is None:
            if node.module.split(".")[0] in ("gspo_dist", "benchmarks", "tests"):
                parts = [a.name for a in node.names if file_of(f"{node.module}.{a.name}") is None]
                absent += [f"{node.lineno}: {node.module}.{name}" for name in parts]
            continue
        there = bound(source)
        absent += [
            f"{node.lineno}: {node.module}.{alias.name}"
            for alias in node.names
            if alias.name not in there and file_of(f"{node.module}.{alias.name}") is None
        ]
    return absent


def test_every_name_that_is_imported_from_here_exists() -> None:
    broken = []
    for path in files():
        broken += [f"{path.relative_to(ROOT)}:{line}" for line in missing(ast.parse(path.read_text()))]
    assert broken == []


def test_the_rule_sees_names_and_modules_that_are_gone() -> None:
    """Guards the guard."""
    source = (
        "def later():\n"
        "    from gspo_dist.data.prompts import load_prompts, gone\n"
        "    from gspo_dist.nowhere import anything\n"
        "    from gspo_dist.data import prompts, nowhere\n"
    )
    assert missing(ast.parse(source)) == [
        "2: gspo_dist.data.prompts.gone",
        "3: gspo_dist.nowhere.anything",
        "4: gspo_dist.data.nowhere",
    ]
