"""The package loads nothing heavy, its names resolve, and type checkers see what users get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gspo_dist.objectives as package

ROOT = Path(__file__).resolve().parents[3]


def test_importing_the_package_and_its_tables_loads_no_torch_nor_numpy():
    code = (
        "import sys, gspo_dist.objectives\n"
        "from gspo_dist.objectives import Clip, OBJECTIVE_SPECS, legality\n"
        "legality.check('gspo', old_logprobs='rollout'); legality.format_table()\n"
        "print(sorted({'torch', 'numpy', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_lazy_name_resolves_and_an_unknown_one_does_not():
    for name in dir(package):
        getattr(package, name)
    with pytest.raises(AttributeError, match="gspo_dists"):
        package.gspo_dists  # noqa: B018 - the access is the test


def test_the_names_for_type_checkers_are_the_names_that_load():
    tree = ast.parse(Path(package.__file__).read_text())
    typed = {
        alias.name: node.module.rsplit(".", 1)[1]
        for block in tree.body
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in block.body
        for alias in node.names
    }
    assert typed == package._HOME
    assert package.__all__ == list(package._HOME)


TYPED = """
from __future__ import annotations

import torch
from torch import Tensor

from gspo_dist.objectives import Objective, ObjectiveSpec, Segments, Surrogate


def squared(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, segments: Segments, *, strength: float = 1.0
) -> Surrogate:
    log_ratio = logprobs - old_logprobs
    sequence = segments.expand(segments.mean(log_ratio))
    never = torch.zeros_like(log_ratio, dtype=torch.bool)
    loss = -advantages * log_ratio + 0.5 * strength * sequence**2
    return Surrogate(loss, log_ratio.exp().detach(), never, never)


SQUARED = Objective(ObjectiveSpec("squared", "sequence_mean", defaults={"strength": 1.0}), squared)
"""


@pytest.mark.slow
def test_a_users_typed_objective_passes_mypy_and_a_wrong_one_does_not(tmp_path):
    (tmp_path / "right.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(TYPED.replace("segments.mean(log_ratio)", "segments.mean(1.0)"))

    def check(name):
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / name)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)

    right, wrong = check("right.py"), check("wrong.py")
    assert right.returncode == 0, right.stdout
    assert 'Argument 1 to "mean" of "Segments" has incompatible type "float"' in wrong.stdout
