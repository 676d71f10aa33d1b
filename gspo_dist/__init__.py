"""gspo_dist: reinforcement learning of Mixture-of-Experts language models with GSPO."""

from __future__ import annotations

from pathlib import Path


def __getattr__(name: str) -> str:
    # On demand, because reading package metadata takes longer than the rest of this import.
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version(checkout: Path = Path(__file__).parents[1]) -> str:
    """The installed version. Not installed, it is pyproject.toml's with `+checkout` behind it."""
    import importlib.metadata
    import tomllib

    try:
        return importlib.metadata.version("gspo-dist")
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["version"] + "+checkout"
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return "unknown"
