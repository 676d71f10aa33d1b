"""The table of learners/README.md: families that the megatron learner builds, and whose routes are replayed.

    python benchmarks/learner_families.py            prints the table
    python benchmarks/learner_families.py --write    puts it into gspo_dist/learners/README.md

It asks the code that a run asks: `learners.megatron.architecture` for a family's default config, and the
tables of `routing.huggingface` for the router classes in its modeling file. No model is built.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import warnings
from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from gspo_dist.learners.megatron.architecture import SUPPORTED, from_hf
from gspo_dist.routing.huggingface import KINDS, REFUSED

README = Path(__file__).resolve().parents[1] / "gspo_dist" / "learners" / "README.md"
BEGIN, END = "<!-- learner_families.py: begin -->", "<!-- learner_families.py: end -->"


def router_of(family: str) -> str:
    """What the routing adapter says of a family: the router class that it replays, a refusal, or a dash."""
    package = importlib.util.find_spec(f"transformers.models.{family.removesuffix('_text')}")
    if package is None or package.submodule_search_locations is None:
        return "–"
    source = "".join(p.read_text() for p in Path(package.submodule_search_locations[0]).glob("modeling_*.py"))
    classes = re.findall(r"^class (\w+)\(", source, re.M)
    refused = [name for name in classes if name in REFUSED]
    if refused:
        return f"refused: {REFUSED[refused[0]]}"
    known = [name for name in classes if name in KINDS]
    if known:
        return f"`{known[0]}`"
    strange = [name for name in classes if name.lower().endswith("router")]
    return f"refused: `{strange[0]}` is not checked" if strange else "–"


def megatron(family: str, hf_class: str) -> str:
    """Whether the megatron learner builds the family at its default config."""
    if hf_class not in SUPPORTED:
        return "refused by name"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family).to_dict()
    try:
        from_hf(config | {"architectures": [hf_class]})
    except ValueError as error:
        return f"refused: {error}"
    return "built"


def table() -> str:
    """One row per family that Megatron builds or that has routers."""
    rows = ["| family | class | Megatron | routes recorded and replayed |", "|---|---|---|---|"]
    for family, hf_class in sorted(CLASSES.items()):
        routes, built = router_of(family), megatron(family, hf_class)
        if routes != "–" or built == "built":
            rows.append(f"| {family} | {hf_class} | {built} | {routes} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """A README with the table between its two marks."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into the README")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
