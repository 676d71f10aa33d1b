"""The house rules that show in imports: floors, one home for each dependency, light entry points.

A module imports its own floor or a lower one, wherever in the file the import stands.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "gspo_dist"

# The longest name that a module starts with decides; a module without any is a failure.
FLOORS = {
    "cli": 5,
    "__main__": 5,
    "trainer": 4,
    "evaluation": 4,
    "coldstart": 4,
    "studies": 4,
    "examples": 4,
    "actors": 3,
    "rollout": 2,
    "learners": 2,
    "weights": 2,
    "environments": 2,
    "rewards": 2,
    "data": 2,
    "checkpoint": 2,
    "metrics": 2,
    "metrics.__init__": 0,
    "metrics.stat": 0,
    "metrics.names": 0,
    "metrics.table": 0,
    "routing.huggingface": 2,
    "routing.megatron": 2,
    "routing.deepspeed": 2,
    "routing": 1,
    "sandbox": 1,
    "config": 1,
    "planner": 1,
    "types": 1,
    "candidates": 1,
    "packing": 1,
    "probes": 1,
    "objectives": 0,
    "models": 0,
    "checks": 0,
    "failures": 0,
    "files": 0,
    "host": 0,
    "loading": 0,
    "partition": 0,
    "__init__": 0,
}
HOMES = {
    "wandb": ("metrics.wandb_sink",),
    "wandb_workspaces": ("studies.workspace",),
    "ray": ("actors",),
    "vllm": ("rollout", "weights", "learners.exact"),
    "deepspeed": ("learners.deepspeed", "routing.deepspeed"),
    "megatron": ("learners.megatron", "routing.megatron"),
    "transformer_engine": ("learners.megatron",),
    "mcp": ("environments",),
    "websockets": ("environments",),
    "hydra": ("cli",),
    "omegaconf": ("cli",),
}
LIGHT_PLANNER = {"gspo_dist"} | set(sys.stdlib_module_names)


def modules() -> dict[str, ast.Module]:
    """Dotted name below gspo_dist (a package is name.__init__) -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module imports, lazily, for typing, or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["gspo_dist", *name.split(".")[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from package import module` and `from module import name` look alike: both readings are checked
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def floor(name: str) -> int | None:
    known = [prefix for prefix in FLOORS if covers(prefix, name)]
    return FLOORS[max(known, key=len)] if known else None


def target(imported: str, known: set[str]) -> str | None:
    """The module that an absolute name means: itself, its package, or where the name is defined."""
    parts = imported.split(".")[1:]
    while parts:
        name = ".".join(parts)
        for candidate in (name, f"{name}.__init__"):
            if candidate in known:
                return candidate
        parts.pop()
    return None


def test_every_module_has_a_floor() -> None:
    assert [name for name in modules() if floor(name) is None] == []


def test_a_module_imports_its_own_floor_or_a_lower_one() -> None:
    found = modules()
    broken = []
    for name, tree in found.items():
        for line, imported in imports(name, tree):
            if imported.split(".")[0] != "gspo_dist":
                continue
            other = target(imported, set(found))
            if other is not None and (floor(other) or 0) > (floor(name) or 0):
                broken.append(f"{name}:{line} (floor {floor(name)}) imports {other} (floor {floor(other)})")
    assert broken == []


def test_every_dependency_has_one_home() -> None:
    broken = []
    for name, tree in modules().items():
        for line, imported in imports(name, tree):
            homes = HOMES.get(imported.split(".")[0])
            if homes is not None and not any(covers(home, name) for home in homes):
                broken.append(f"{name}:{line} imports {imported}, whose home is {' and '.join(homes)}")
    assert broken == []


def test_cores_are_counted_in_one_place() -> None:
    """os.cpu_count() counts the host's cores, not those that a process is granted."""
    counting = {"cpu_count", "sched_getaffinity", "process_cpu_count"}
    found = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in counting
    }
    assert found == {"host"}


def test_the_planner_needs_the_standard_library_only() -> None:
    used = {
        (name, imported)
        for name, tree in modules().items()
        if covers("planner", name)
        for _, imported in imports(name, tree)
        if imported.split(".")[0] not in LIGHT_PLANNER
    }
    assert used == set()


def test_the_rules_see_lazy_relative_and_named_imports() -> None:
    """Guards the guard: every way to import, in a module of the lowest floor."""
    source = (
        "from __future__ import annotations\n"
        "import importlib\n"
        "def f():\n"
        "    from ..actors import placement\n"
        "    from . import specs\n"
        "    importlib.import_module('ray.util')\n"
        "    import gspo_dist.trainer.loop as loop\n"
    )
    seen = {name for _, name in imports("objectives.losses", ast.parse(source))}
    assert {
        "gspo_dist.actors.placement",
        "gspo_dist.objectives.specs",
        "ray.util",
        "gspo_dist.trainer.loop",
    } <= seen
    assert floor("actors.placement") == 3
    assert floor("metrics.stat") == 0
    assert floor("metrics.sinks") == 2
    assert floor("actorsx") is None
    assert target("gspo_dist.config.RunConfig", {"config"}) == "config"
    assert target("gspo_dist.planner.plan", {"planner.__init__", "planner.plan"}) == "planner.plan"


def test_configuration_planner_and_command_line_load_nothing_heavy() -> None:
    program = (
        "import sys, gspo_dist.config, gspo_dist.planner, gspo_dist.cli.main, gspo_dist.cli.doctor\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    heavy = {
        "torch",
        "ray",
        "vllm",
        "transformers",
        "deepspeed",
        "megatron",
        "wandb",
        "numpy",
        "hydra",
        "omegaconf",
    }
    assert heavy & set(out.split()) == set()
    assert "gspo_dist" in out.split()


def test_help_loads_nothing_heavy_either() -> None:
    program = (
        "import sys\nfrom gspo_dist.cli.main import main\nmain(['--help'])\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    text, loaded = out.split("LOADED")
    assert "train" in text
    assert {"torch", "ray", "vllm"} & set(loaded.split()) == set()
