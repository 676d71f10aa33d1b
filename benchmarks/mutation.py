"""Breaks modules on purpose, one small change at a time, and reports the changes that no test notices.

    python benchmarks/mutation.py --modules rewards checkpoint --report benchmarks/reports/mutation.md
    python benchmarks/mutation.py --modules trainer/loop.py --sample 40 --seed 1
    python benchmarks/mutation.py --modules weights --list            # the changes, without running anything

`--modules` takes files and rooms below gspo_dist (`rewards`, `trainer/loop.py`, `checkpoint`). Without it,
the rooms whose wiring must be held are taken: trainer, actors, weights, packing, checkpoint, rewards.
`--sample N` takes N changes of each module, the same ones for the same `--seed`.

Which tests belong to a module
    `room/module.py` has `tests/unit/room/test_module.py`, and what `EXTRA_TESTS` below adds for it. A module
    with neither has every test of `tests/unit/room`. Tests marked slow run too. The first failure ends the
    run. So what starts no process comes first (`CHEAP_TESTS`), then the module's own file. A module whose
    tests fail without any change is an error, because nothing could be said about it.
    A change that survives these is looked at once more, by every other file of `tests/unit` that imports the
    module (without its tests marked slow or alone). Where those fail without any change, nobody looks twice.

What is changed, one place at a time
    - A comparison is negated, and moved by its boundary.
    - A condition is negated.
    - `and` and `or`, `+` and `-`, `*` and `/` change places.
    - A number grows by one. A truth value flips.
    - A call that stands alone, an augmented assignment, an assignment to an attribute or item, and a raise
      are dropped.
    - The first two positional arguments change places. A keyword argument is left out.
    - A returned value becomes None.
    Texts, annotations and decorators stay as they are.

How it runs
    Each job has a copy of the package and its tests. The changed module is written there, and a child forked
    from this process runs pytest in it. The child has torch and other heavy libraries imported already, but
    never the package. Processes that the tests start (Ray workers, ranks) import the copy too, by PYTHONPATH.

What is said of a change
    killed: its tests fail. timed out: they take five times as long as without it, and at least 30 s, or
    longer than `--timeout`. survived: they pass. Ctrl-C ends the run; what was judged until then is reported.

`mutation_explained.toml` beside this file holds the reason for each survivor that cannot or need not be
killed. It has a table per module, whose keys read `function: change`, as printed in the report. The table
`"*"` holds patterns for all modules, in which `*` stands for any text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import fnmatch
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("trainer", "actors", "weights", "packing", "checkpoint", "rewards")
CHEAP_TESTS = {
    "actors": [
        f"tests/unit/actors/test_{name}.py"
        for name in ("wires", "waiting", "successors", "ranks", "engines", "grants")
    ]
}
"""Room -> files that decide most of its changes in seconds, where its other tests start processes."""

EXTRA_TESTS = {
    "actors/learner_group.py": [
        "tests/unit/actors/test_rendezvous.py",
        "tests/unit/actors/test_weight_link.py",
    ],
    "rewards/worker.py": ["tests/unit/rewards/test_pool.py"],
    "trainer/setup/build.py": ["tests/unit/trainer/test_loop.py", "tests/unit/trainer/test_ahead.py"],
    "weights": ["tests/unit/weights"],
}
"""Module or room -> files or folders of tests that hold it beside its own file."""

HEAVY = {
    "torch", "numpy", "transformers", "safetensors", "tokenizers", "hypothesis", "_pytest", "scipy",
    "sympy", "mpmath", "math_verify", "antlr4", "latex2sympy2_extended",
}  # fmt: skip
"""Libraries that are imported once, before the forks. They start no threads and no processes of their own."""

COPIED = ("gspo_dist", "tests", "conf", "benchmarks", "launch", "docker", "pyproject.toml", "README.md")
"""What tests read of the repository."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.GtE, ast.LtE), ast.LtE: (ast.Gt, ast.Lt),
    ast.Gt: (ast.LtE, ast.GtE), ast.GtE: (ast.Lt, ast.Gt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),  # codespell:ignore notin
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
UNCHANGED_FIELDS = {"annotation", "returns", "decorator_list", "type_comment"}
TEXT_LENGTH = 100


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    """Path below gspo_dist."""
    line: int
    """Line of the changed code in the module as it stands."""
    function: str
    """Qualified name of the function or class around it; `module` at the top level."""
    change: str
    """`old -> new`, as source."""
    source: str
    """The whole changed module."""

    @property
    def key(self) -> str:
        """The key of its explanation."""
        return f"{self.function}: {self.change}"


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What `node` is replaced by, one replacement after the other; `node` itself stays as it is."""

    def edited(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op, *others]):
            yield from (edited(ops=[new(), *others]) for new in COMPARISONS[type(op)])
        case ast.BoolOp(op=op):
            yield edited(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.BinOp(op=ast.Div(), right=ast.JoinedStr() | ast.Constant(value=str())):
            return  # a path, not a quotient: any other operator is a TypeError
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield edited(op=OPERATORS[type(op)]())
        case ast.Constant(value=bool(value)):
            yield edited(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield edited(value=value + 1)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, (ast.Compare, ast.UnaryOp, ast.Constant)):
                yield edited(test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise():
            yield ast.Pass()
        case ast.AugAssign(op=op):
            if type(op) in OPERATORS:
                yield edited(op=OPERATORS[type(op)]())
            yield ast.Pass()
        case ast.Assign(targets=targets):
            if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in targets):
                yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if not (
            isinstance(value, ast.Constant) and value.value is None
        ):
            yield edited(value=ast.Constant(None))
        case ast.Call(args=args, keywords=keywords):
            fixed = any(isinstance(arg, ast.Starred) for arg in args[:2])
            fixed |= isinstance(node.func, ast.Name) and node.func.id in ("max", "min")  # order means nothing
            if len(args) > 1 and not fixed and ast.dump(args[0]) != ast.dump(args[1]):
                yield edited(args=[args[1], args[0], *args[2:]])
            named = [i for i, keyword in enumerate(keywords) if keyword.arg is not None]
            yield from (edited(keywords=[*keywords[:i], *keywords[i + 1 :]]) for i in named)


def places(parent: ast.AST, function: str = "") -> Iterator[tuple[Any, Any, ast.AST, str]]:
    """(holder, key, node, function around it) of every node below `parent` that may be replaced."""
    for name, value in ast.iter_fields(parent):
        if name in UNCHANGED_FIELDS or isinstance(value, ast.JoinedStr):
            continue
        slots = [(value, i) for i in range(len(value))] if isinstance(value, list) else [(parent, name)]
        for holder, key in slots:
            node = holder[key] if isinstance(holder, list) else getattr(holder, key)
            if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue
            yield holder, key, node, function or "module"
            inner = function
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{function}.{node.name}".lstrip(".")
            yield from places(node, inner)


def mutants_of(root: Path, module: str) -> list[Mutant]:
    """Every change of a module, in the order of its text."""
    tree = ast.parse((root / "gspo_dist" / module).read_text(encoding="utf-8"))
    found = []
    for holder, key, node, function in list(places(tree)):
        for new in variants(node):
            change = _change(node, new)
            if isinstance(holder, ast.keyword) and isinstance(getattr(node, "value", None), bool):
                change = f"{holder.arg}={node.value} -> {holder.arg}={new.value}"
            _put(holder, key, new)
            found.append(Mutant(module, getattr(node, "lineno", 0), function, change, ast.unparse(tree)))
            _put(holder, key, node)
    return found


def _put(holder: Any, key: Any, node: ast.AST) -> None:
    if isinstance(holder, list):
        holder[key] = node
    else:
        setattr(holder, key, node)


def _change(old: ast.AST, new: ast.AST) -> str:
    if isinstance(old, (ast.If, ast.While, ast.IfExp)) and isinstance(new, (ast.If, ast.While, ast.IfExp)):
        old, new = old.test, new.test
    before, after = (" ".join(ast.unparse(node).split()) for node in (old, new))
    if isinstance(new, ast.Pass):
        return f"drop {_short(before)}"
    differing = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    head = next(differing, min(len(before), len(after)))
    if max(len(before), len(after)) > TEXT_LENGTH and head > TEXT_LENGTH // 2:
        name = before.split("(")[0]
        before, after = (f"{name}(...{text[head - TEXT_LENGTH // 4 :]}" for text in (before, after))
    return f"{_short(before)} -> {_short(after)}"


def _short(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 3] + "..."


def tests_of(root: Path, module: str) -> list[str]:
    """The tests that belong to a module, the cheapest first. Raises ValueError when there are none."""
    room, _, name = module.rpartition("/")
    own = f"tests/unit/{room}/test_{name}".replace("//", "/")
    top = module.split("/")[0]
    known = [*CHEAP_TESTS.get(top, []), own, *EXTRA_TESTS.get(module, []), *EXTRA_TESTS.get(top, [])]
    found = [path for path in dict.fromkeys(known) if (root / path).exists()]
    if not found and (root / "tests/unit" / room).is_dir() and room:
        found = [f"tests/unit/{room}"]
    if not found:
        raise ValueError(f"{module} has no tests: expected {own}, or an entry of EXTRA_TESTS")
    return found


def other_tests(root: Path, module: str, tests: Sequence[str]) -> list[str]:
    """The files below tests/unit that import a module, beside `tests`, its own."""
    package, _, name = f"gspo_dist/{module.removesuffix('.py')}".replace("/", ".").rpartition(".")
    dotted = rf"\b{package}\.{name}\b(?!\.)|\bfrom {package} import .*\b{name}\b"
    own = [root / path for path in tests]
    files = sorted((root / "tests/unit").rglob("test_*.py"))
    return [
        file.relative_to(root).as_posix()
        for file in files
        if not any(file == path or path in file.parents for path in own)
        and re.search(dotted, file.read_text(encoding="utf-8"))
    ]


def modules_of(root: Path, names: Iterable[str]) -> list[str]:
    """Files and rooms as module paths below gspo_dist. Raises ValueError for a name that is neither."""
    package, found = root / "gspo_dist", []
    for name in names:
        file = package / (name if name.endswith(".py") else f"{name}.py")
        if file.is_file():
            found.append(file)
        elif (package / name).is_dir():
            found += sorted(path for path in (package / name).rglob("*.py") if path.read_text().strip())
        else:
            raise ValueError(f"--modules takes files and rooms below {package}: got {name!r}")
    return [path.relative_to(package).as_posix() for path in found]


@dataclass
class Child:
    """A running pytest, in the copy of its job."""

    pid: int
    deadline: float
    started: float


def start(
    tree: Path, module: str, source: str, tests: Sequence[str], timeout: float, *, learn: bool = False
) -> Child:
    """Writes the changed module into the copy and forks the pytest that judges it."""
    target = tree / "gspo_dist" / module
    target.write_text(source, encoding="utf-8")
    # Compiled files are told apart by size and whole seconds only: two changes may agree in both.
    for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
        stale.unlink()
    now = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(tree, tests, learn)
    return Child(pid, now + timeout, now)


def _child(tree: Path, tests: Sequence[str], learn: bool) -> None:
    """Runs pytest and ends with its status; never returns."""
    code = 70
    try:
        os.setsid()  # one group with all that the tests start, so that a kill reaches everything
        output = os.open(tree / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path[1:] if Path(p or ".").resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(tree)
        # Plug-ins of other packages, and the collection of garbage at the end, cost more than most tests.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        import pytest

        left_out = ("cacheprovider", "unraisableexception", "threadexception")
        code = int(pytest.main(["-x", "-q", *(f"-pno:{plugin}" for plugin in left_out), *tests]))
        if learn:
            heavy = [name for name in sys.modules if name.split(".")[0] in HEAVY]
            (tree / "heavy.json").write_text(json.dumps(heavy))
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: Child) -> str | None:
    """killed, survived or timed out; None while it runs. Whatever the tests left behind is ended too."""
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if pid == 0 and time.monotonic() < child.deadline:
        return None
    if pid == 0:
        end(child)
        return "timed out"
    _kill_group(child)
    return "survived" if status == 0 else "killed"


def end(child: Child) -> None:
    """Ends a pytest that still runs, and all that its tests started."""
    _kill_group(child)
    os.kill(child.pid, signal.SIGKILL)  # it may have no group of its own yet
    os.waitpid(child.pid, 0)


def _kill_group(child: Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def make_copy(root: Path, place: Path) -> Path:
    """A copy of what the tests read, for one job."""
    ignore = shutil.ignore_patterns("__pycache__", "*.html", "*.png")
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, place / name, symlinks=True, ignore=ignore)
        elif source.is_file():
            shutil.copy2(source, place / name)
    return place


def check_baseline(root: Path, tree: Path, module: str, tests: Sequence[str]) -> float:
    """Seconds that the tests of an unchanged module take. Raises ValueError when they fail."""
    source = ast.unparse(ast.parse((root / "gspo_dist" / module).read_text(encoding="utf-8")))
    child = start(tree, module, source, tests, 600, learn=True)
    try:
        while (verdict := ended(child)) is None:
            time.sleep(0.02)
    except KeyboardInterrupt:
        end(child)
        raise
    if verdict != "survived":
        tail = (tree / "output.txt").read_text(errors="replace")[-3000:]
        raise ValueError(f"the tests of {module} must pass without a change: they {verdict}\n{tail}")
    for name in json.loads((tree / "heavy.json").read_text()):
        if name not in sys.modules:
            # Some modules can only be imported by their own package; the children then import them again.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # the children's collections then leave these libraries' pages alone
    return time.monotonic() - child.started


def run(
    root: Path, mutants: Sequence[Mutant], trees: Sequence[Path], timeout: float | None
) -> Iterator[tuple[Mutant, str]]:
    """Judges the mutants of one module, one per copy at a time. Raises what `check_baseline` raises."""
    module = mutants[0].module
    tests = tests_of(root, module)
    others = other_tests(root, module, tests)
    again: list[Mutant] = []
    try:
        for mutant, verdict in _judge(root, mutants, trees, tests, timeout):
            if verdict == "survived" and others:
                again.append(mutant)
            else:
                yield mutant, verdict
        if again:
            quick = ["-m", "not slow and not alone", *others]
            for mutant, verdict in _judge(root, list(again), trees, quick, timeout):
                again.remove(mutant)
                yield mutant, verdict
    except (ValueError, KeyboardInterrupt) as error:
        if again:
            why = str(error) or "interrupted"
            print(f"{module}: no second look at {len(again)} changes: {why}", file=sys.stderr, flush=True)
        yield from ((mutant, "survived") for mutant in again)
        # Ctrl-C gets out, and so does a module whose own tests fail. Where others' fail, nobody looks twice.
        if not again or isinstance(error, KeyboardInterrupt):
            raise


def _judge(
    root: Path, mutants: Sequence[Mutant], trees: Sequence[Path], tests: Sequence[str], timeout: float | None
) -> Iterator[tuple[Mutant, str]]:
    """Mutants of one module, judged by these tests."""
    module = mutants[0].module
    unchanged_s = check_baseline(root, trees[0], module, tests)
    limit = timeout or max(30.0, 5 * unchanged_s)
    waiting, running = list(reversed(mutants)), {}
    try:
        while waiting or running:
            for tree in trees:
                if tree in running:
                    mutant, child = running[tree]
                    if (verdict := ended(child)) is not None:
                        del running[tree]
                        yield mutant, verdict
                if tree not in running and waiting:
                    mutant = waiting.pop()
                    running[tree] = mutant, start(tree, module, mutant.source, tests, limit)
            time.sleep(0.01)
    finally:  # Ctrl-C does not reach the children: each is in a group of its own
        for _, child in running.values():
            end(child)
    for tree in trees:
        shutil.copy2(root / "gspo_dist" / module, tree / "gspo_dist" / module)


def reason_for(mutant: Mutant, explained: dict[str, dict[str, str]]) -> str | None:
    """Why a survivor may survive, if somebody has said so."""
    own = explained.get(mutant.module, {}).get(mutant.key)
    patterns = explained.get("*", {}).items()
    return own or next((why for pattern, why in patterns if fnmatch.fnmatchcase(mutant.key, pattern)), None)


def report(
    verdicts: Sequence[tuple[Mutant, str]],
    explained: dict[str, dict[str, str]],
    command: str,
    *,
    interrupted: bool = False,
) -> str:
    """The verdicts as Markdown: a table by module, then every survivor with its explanation."""
    until = " It was interrupted: the changes are those judged until then." if interrupted else ""
    lines = ["# Changes that no test notices", "", f"Made by `{command}`.{until}", ""]
    lines += ["| module | changes | killed | timed out | survived | of them explained | unexplained |"]
    lines += ["|---|---|---|---|---|---|---|"]
    rows, survivors = {}, []
    for mutant, verdict in verdicts:
        row = rows.setdefault(mutant.module, [0] * 6)
        reason = reason_for(mutant, explained)
        row[0] += 1
        row[{"killed": 1, "timed out": 2, "survived": 3}[verdict]] += 1
        if verdict == "survived":
            row[4 if reason else 5] += 1
            survivors.append((mutant, reason))
    total = [sum(column) for column in zip(*rows.values(), strict=True)] or [0] * 6
    lines += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in rows.items()]
    lines += ["| **all** | " + " | ".join(map(str, total)) + " |", ""]
    lines += [f"{total[5] / max(1, total[0]):.1%} of the changes survive without an explanation.", ""]
    for mutant, reason in survivors:
        place = f"{mutant.module}:{mutant.line}"
        lines.append(f"- {place} `{mutant.key.replace('`', chr(39))}`: {reason or '**unexplained**'}")
    return "\n".join(lines) + "\n"


def judged(root: Path, trees: Sequence[Path], args: argparse.Namespace) -> Iterator[tuple[Mutant, str]]:
    """The sampled changes of every module with their verdicts; with `--list` they are only printed."""
    for module in modules_of(root, args.modules):
        mutants = mutants_of(root, module)
        if args.sample is not None and args.sample < len(mutants):
            chosen = random.Random(f"{args.seed}:{module}").sample(range(len(mutants)), args.sample)
            mutants = [mutants[i] for i in sorted(chosen)]
        if args.list:
            print("\n".join(f"{m.module}:{m.line} {m.key}" for m in mutants))
        elif mutants:
            began = time.monotonic()
            yield from run(root, mutants, trees, args.timeout)
            seconds = time.monotonic() - began
            print(f"{module}: {len(mutants)} in {seconds:.0f} s", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=list(ROOMS), help="files and rooms below gspo_dist")
    parser.add_argument("--sample", type=int, metavar="N", help="N changes of each module; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--timeout", type=float, help="seconds per change, instead of five times the baseline"
    )
    parser.add_argument("--report", type=Path, help="a Markdown file; its survivors are printed in any case")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    reasons = args.root / "benchmarks" / "mutation_explained.toml"
    explained = tomllib.loads(reasons.read_text()) if reasons.is_file() else {}
    verdicts: list[tuple[Mutant, str]] = []
    interrupted, failed = False, None
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        # The originals are copied too: a run takes long, and somebody may edit the modules meanwhile.
        root = make_copy(args.root, Path(place) / "original")
        trees = [] if args.list else [make_copy(root, Path(place) / f"job{i}") for i in range(args.jobs)]
        try:
            for mutant, verdict in judged(root, trees, args):
                verdicts.append((mutant, verdict))
                if verdict == "survived" and reason_for(mutant, explained) is None:
                    print(f"survived {mutant.module}:{mutant.line} {mutant.key}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        except ValueError as error:  # a module without tests that pass: what was judged before it is reported
            interrupted, failed = True, error
    if failed is not None and not verdicts:
        raise failed
    if args.list:
        return 0
    arguments = " ".join(argv if argv is not None else sys.argv[1:])
    command = f"python benchmarks/mutation.py {arguments}".strip()
    text = report(verdicts, explained, command, interrupted=interrupted)
    if args.report is not None:
        args.report.write_text(text, encoding="utf-8")
    print(text.split("\n- ")[0])
    if failed is not None:
        raise failed
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
