"""The command `gspo`. The only module that knows hydra; commands import what they need when they run."""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

USAGE = """\
usage: gspo COMMAND [arguments]

  train       train a policy:          gspo train experiment=quickstart [overrides]
  compare     arms times seeds:        gspo compare study=gspo_vs_grpo [overrides]
  evaluate    held-out accuracy:       gspo evaluate model=local model.path=DIR data=file data.heldout=F reward=math
  plan        what fits, before paying for GPUs:  gspo plan experiment=qwen3_30b_a3b/gspo layout=qwen3_30b_a3b_4x8
  export      a run's weights as an HF folder:    gspo export --run RUN_DIR --to FOLDER
  make-model  the quickstart's cold-start model:  gspo make-model [--to FOLDER]
  legality    which objective, old log-probs, replay and correction go together, and why the rest is refused
  doctor      what works on this host, and what to install for what does not
  completion  tab completion:          eval "$(gspo completion bash)"

`gspo train --help` lists the configuration groups; `gspo train --cfg job` prints the resolved configuration;
gspo_dist/config/ documents every knob.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: bad input ends with a message and status 2, a failed run with status 1."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        from gspo_dist.checks import nearest

        _fail(f"gspo has no command {name!r}; {nearest(name, COMMANDS)}", 2)
    COMMANDS[name](rest)


def _fail(message: str, status: int) -> typing.NoReturn:
    print(f"gspo: error: {message}", file=sys.stderr)
    raise SystemExit(status)


# -- hydra ------------------------------------------------------------------------------------------------------


def conf_dir() -> Path:
    """The folder of config groups (in a checkout a link to the one at its root)."""
    return Path(__file__).parents[1] / "conf"


def open_schema(cls: type) -> type:
    """A config dataclass without the frozen flag: omegaconf makes nodes of frozen classes read-only, which would
    refuse every override. Field types and defaults stay, so hydra checks names and types."""
    hints = typing.get_type_hints(cls)
    fields = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            kind = open_schema(typing.cast(type, kind))
            default = dataclasses.field(default_factory=kind)
        elif f.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=f.default_factory)
        else:
            default = dataclasses.field(default=f.default)
        fields.append((f.name, kind, default))
    return dataclasses.make_dataclass(cls.__name__, fields)


def register_schema() -> None:
    """Makes RunConfig's schema known to hydra as `run_schema`."""
    from hydra.core.config_store import ConfigStore

    from gspo_dist.config import RunConfig

    ConfigStore.instance().store(name="run_schema", node=open_schema(RunConfig))


def compose(overrides: Sequence[str], config_name: str = "config") -> dict[str, Any]:
    """The resolved configuration as a plain mapping.

    Raises ValueError for an unknown key (with the nearest one), group or value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            config = hydra_compose(config_name, overrides=list(overrides))
            return typing.cast(dict, OmegaConf.to_container(config, resolve=True))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, overrides)) from None


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """hydra's message, and for an unknown key the nearest known one."""
    from gspo_dist.checks import nearest

    texts = [str(error), str(error.__cause__ or "")]
    known = sorted(_schema_keys())
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0]
        if (
            "=" in override
            and key not in known
            and "@" not in key
            and any(key.split(".")[-1] in t for t in texts)
        ):
            groups = [p.name for p in conf_dir().iterdir() if p.is_dir()]
            if key not in groups and not any(
                key.startswith(f"{k}.") for k in known if k.endswith(("params", "options"))
            ):
                close = nearest(key, known).split(" known:")[0].split("known:")[0].strip()
                return f"unknown config key {key!r}. {close or 'gspo train --cfg job prints the known ones'}"
    return " ".join(t.strip().splitlines()[0] for t in texts if t.strip())


def _schema_keys() -> set[str]:
    from gspo_dist.config import RolloutConfig, RunConfig
    from gspo_dist.config.mapping import to_mapping

    def walk(node: Mapping[str, Any], prefix: str) -> typing.Iterator[str]:
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")

    return set(walk(to_mapping(RunConfig(rollout=RolloutConfig(group_size=2, max_completion_tokens=1))), ""))


def run_config(overrides: Sequence[str]) -> Any:
    """A checked RunConfig from hydra overrides. Raises ValueError."""
    from gspo_dist.config import RunConfig
    from gspo_dist.config.mapping import from_mapping

    return from_mapping(RunConfig, compose(overrides))


def _with_hydra(program: str, args: list[str], task: Callable[[Any], None]) -> None:
    """Runs `task(RunConfig)` as a hydra application: --cfg, --help, --info, multirun and completion are hydra's."""
    overrides = [a for a in args if not a.startswith("-") and "=" in a]
    sweep = any(a in ("-m", "--multirun") for a in args)
    if not sweep and not any(
        a in ("-h", "--help", "--hydra-help", "-sc", "--shell-completion") for a in args
    ):
        stray = [a for a in args if not a.startswith("-") and "=" not in a and not _is_flag_value(args, a)]
        if stray:
            _fail(f"overrides have the form key=value: got {stray[0]!r}", 2)
        try:
            compose(overrides)
        except ValueError as error:
            _fail(str(error), 2)
    import hydra
    from omegaconf import OmegaConf

    register_schema()

    def job(node: Any) -> None:
        from gspo_dist.config import RunConfig
        from gspo_dist.config.mapping import from_mapping

        try:
            config = from_mapping(RunConfig, OmegaConf.to_container(node, resolve=True))
        except ValueError as error:
            _fail(str(error), 2)
        task(config)

    sys.argv = [program, *args]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()


def _is_flag_value(args: Sequence[str], value: str) -> bool:
    at = list(args).index(value)
    return at > 0 and args[at - 1] in (
        "--cfg",
        "-c",
        "--package",
        "-p",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
        "--config-path",
        "-cp",
        "--info",
        "-i",
    )


# -- commands ---------------------------------------------------------------------------------------------------


def _guarded(work: Callable[[], Any]) -> Any:
    """Bad input: status 2 and one message. A failed run: status 1, the message and where the details are."""
    import traceback

    try:
        return work()
    except ValueError as error:
        _fail("\n".join([str(error), *getattr(error, "__notes__", [])]), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("GSPO_TRACEBACK"):
            traceback.print_exc()
        notes = "\n".join(getattr(error, "__notes__", []))
        _fail(f"{type(error).__name__}: {error}\n{notes}\n(GSPO_TRACEBACK=1 shows the traceback)", 1)


def _train(args: list[str]) -> None:
    def task(config: Any) -> None:
        from gspo_dist.trainer.loop import train
        from gspo_dist.trainer.setup.build import build

        def work() -> None:
            run = build(config)
            try:
                summary = train(run)
            finally:
                run.release()
            _print_summary(run.run_dir, summary)

        _guarded(work)

    _with_hydra("gspo train", args, task)


def _print_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    print(f"\nrun folder   {run_dir}  (metrics.jsonl, curves.png, samples.jsonl, summary.json)")
    if "heldout_before" in summary:
        before, after = summary["heldout_before"], summary["heldout_after"]
        print(f"held-out accuracy   {before:.1%} -> {after:.1%}   ({100 * (after - before):+.1f} points)")
    print(
        f"{summary['completion_tokens']:,} completion tokens in {summary['seconds'] / 60:.1f} min, "
        f"median {summary['tokens_per_s_median']:,.0f} tokens/s a step"
    )


def _legality(args: list[str]) -> None:
    from gspo_dist.objectives.legality import format_table

    print(format_table())


def _doctor(args: list[str]) -> None:
    from gspo_dist.cli.doctor import diagnose, format_checks

    checks = diagnose()
    print(format_checks(checks))
    raise SystemExit(any(c.status == "missing" and c.required for c in checks))


def _evaluate(args: list[str]) -> None:
    def task(config: Any) -> None:
        from gspo_dist.trainer.tools import evaluate_model

        for name, value in sorted(_guarded(lambda: evaluate_model(config)).items()):
            print(f"{name:40s} {value:.4f}")

    _with_hydra("gspo evaluate", args, task)


def _export(args: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(
        "gspo export", description="Writes a run's newest checkpoint as an HF folder."
    )
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--to", required=True, type=Path, help="new or empty folder")
    options = parser.parse_args(args)

    def work() -> None:
        from gspo_dist.trainer.tools import export_run

        done = export_run(options.run.expanduser().resolve(), options.to.expanduser())
        print(f"{done['folder']}: {done['tensors']} tensors after step {done['step']}")

    _guarded(work)


def _compare(args: list[str]) -> None:
    flags = {a for a in args if a.startswith("-")}
    unknown = flags - {"--dry-run", "--report-only", "--html"}
    if unknown:
        _fail(f"gspo compare knows --dry-run, --report-only and --html: got {min(unknown)}", 2)

    def work() -> None:
        from omegaconf import OmegaConf

        from gspo_dist.cli.plan import plan_text
        from gspo_dist.studies.report import write_report
        from gspo_dist.studies.runner import dry_run, run_study
        from gspo_dist.studies.study import load_study

        study = load_study(
            [a for a in args if a not in flags],
            conf_dir(),
            lambda p: OmegaConf.to_container(OmegaConf.load(p)),
        )
        for arm in study.arms:  # every arm is checked before the first one starts
            run_config(study.run_overrides(arm, study.seeds[0]))
        if "--dry-run" in flags:
            print(dry_run(study, lambda overrides: plan_text(run_config(overrides))))
            return
        if "--report-only" not in flags:
            run_study(study)
        command = " ".join(["gspo compare", *[a for a in args if a not in flags]])
        try:
            pages = write_report(study, Path(study.dir) / "report", command, html="--html" in flags)
        except OSError as error:  # a full disk, say
            error.add_note(f"the runs are in {study.dir}; `{command} --report-only` draws the report again")
            raise
        for page in pages:
            print(f"report: {page}")

    _guarded(work)


def _plan(args: list[str]) -> None:
    own = dict((a.split("=", 1) for a in args if a.startswith("plan.") and "=" in a))
    rest = [a for a in args if a.split("=", 1)[0] not in own]
    unknown = set(own) - {"plan.gpu", "plan.nodes", "plan.gpus_per_node", "plan.model"}
    if unknown:
        _fail(f"gspo plan knows plan.gpu, plan.nodes, plan.gpus_per_node, plan.model: got {min(unknown)}", 2)
    empty = sorted(key for key, value in own.items() if not value)
    if empty:
        _fail(f"{empty[0]} needs a value: got none; leave it out for the run's own", 2)

    def task(config: Any) -> None:
        from gspo_dist.cli.plan import plan_text

        print(_guarded(lambda: plan_text(config, **{k.removeprefix("plan."): v for k, v in own.items()})))

    _with_hydra("gspo plan", rest, task)


def _make_model(args: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser("gspo make-model", description="Makes and caches a cold-start model.")
    parser.add_argument(
        "--recipe", default="quickstart", help="quickstart (default) or peer (random, for speed tests)"
    )
    parser.add_argument("--to", help="also copy the folder here")
    parser.add_argument("--cache-dir", default="~/.cache/gspo_dist")
    options = parser.parse_args(args)

    def work() -> None:
        import shutil

        from gspo_dist.coldstart.make import ensure_model
        from gspo_dist.config import ModelConfig

        folder = ensure_model(ModelConfig(recipe=options.recipe, cache_dir=options.cache_dir))
        if options.to:
            shutil.copytree(folder, options.to, dirs_exist_ok=True)
        print(options.to or folder)

    _guarded(work)


COMPLETION = r"""
_gspo_complete() {
  local cur="${COMP_WORDS[COMP_CWORD]}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS_HERE" -- "$cur")); return
  fi
  case "${COMP_WORDS[1]}" in train|compare|evaluate|plan) ;; *) return ;; esac
  local IFS=$'\n'
  COMPREPLY=($(COMP_LINE="gspo ${COMP_LINE#gspo ${COMP_WORDS[1]} }" COMP_POINT=0 \
    gspo train -sc query=bash 2>/dev/null | tr ' ' '\n'))
  [[ "${COMPREPLY[0]}" == *= || "${COMPREPLY[0]}" == *. ]] && compopt -o nospace
}
complete -o default -F _gspo_complete gspo
"""


def _completion(args: list[str]) -> None:
    if args != ["bash"]:
        _fail(
            f'completion knows bash: got {" ".join(args) or "nothing"}; run eval "$(gspo completion bash)"', 2
        )
    print(COMPLETION.replace("COMMANDS_HERE", " ".join(COMMANDS)))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "plan": _plan,
    "export": _export,
    "legality": _legality,
    "doctor": _doctor,
    "make-model": _make_model,
    "completion": _completion,
}


if __name__ == "__main__":
    main()
