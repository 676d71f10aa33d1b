"""The package says its version, installed or not."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

import gspo_dist


def test_an_installed_package_says_its_metadatas_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9.9 of {name}")
    assert gspo_dist.__version__ == "9.9 of gspo-dist"


def test_a_checkout_that_is_not_installed_says_pyprojects_version(monkeypatch, tmp_path: Path):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    assert gspo_dist._version(tmp_path) == "1.2.3+checkout"
    assert gspo_dist._version(tmp_path / "nowhere") == "unknown"
    assert gspo_dist.__version__.endswith("+checkout")


def test_other_names_are_not_made_up():
    with pytest.raises(AttributeError, match="has no attribute 'version'"):
        _ = gspo_dist.version


def test_the_package_is_marked_as_typed():
    assert (Path(gspo_dist.__file__).parent / "py.typed").is_file()
