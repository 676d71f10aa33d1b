"""No file of the repository names a host that serves packages, or a path of one particular machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNTRACKED = {
    ".git",
    ".venv",
    "runs",
    "wandb",
    "outputs",
    ".cache",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
}

# Written in pieces, so that this file does not name them either.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download." + "pytorch.org",
    "wheels." + "vllm.ai",
    "conda." + "anaconda.org",
    "py" + "pi.nvidia.com",
    "ghcr" + ".io",
    "nv" + "cr.io",
]
PATHS = ["/" + "root/", "/" + "Users/", r"/home/(?!gspo\b)[a-z]"]
NAMES = re.compile("|".join([re.escape(h) for h in HOSTS] + PATHS))


def files() -> Iterator[Path]:
    """What git tracks or would track; without git (a copied tree), everything outside build folders."""
    if (ROOT / ".git").exists():
        out = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        yield from (ROOT / name for name in out.decode().split("\0") if name and (ROOT / name).is_file())
        return
    for path in ROOT.rglob("*"):
        if path.is_file() and not UNTRACKED & set(path.relative_to(ROOT).parts):
            yield path


def test_no_file_names_a_package_host_or_a_machine() -> None:
    found, read = [], 0
    for path in files():
        data = path.read_bytes()
        if b"\0" in data[:1024]:
            continue
        read += 1
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            match = NAMES.search(line)
            if match:
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []
    assert read > 100


def test_the_patterns_find_what_they_are_for() -> None:
    for bad in ("https://" + HOSTS[0] + "/simple", "/" + "root/.venv", "/home/" + "someone/x"):
        assert NAMES.search(bad)
    for good in ("/home/gspo/venv", "an index of packages", "/opt/gspo_dist"):
        assert not NAMES.search(good)
