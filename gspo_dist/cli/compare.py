"""`gspo compare`: the arms of a study times its seeds, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo_dist.cli.compose import conf_dir, plain, run_config
from gspo_dist.cli.exits import fail, guarded

FLAGS = ("--dry-run", "--report-only", "--html")


def main(args: Sequence[str]) -> None:
    """Runs what is not done yet and writes the report.

    --dry-run prints every arm and its plan instead. --report-only writes the report of what is there.
    --html also writes the report as one page that holds everything.
    """
    flags = {a for a in args if a.startswith("-")}
    unknown = flags.difference(FLAGS)
    if unknown:
        fail(f"gspo compare knows {', '.join(FLAGS)}: got {min(unknown)}", 2)
    guarded(lambda: _compare([a for a in args if a not in flags], flags))


def _compare(overrides: list[str], flags: set[str]) -> None:
    from omegaconf import OmegaConf

    from gspo_dist.cli.plan import plan_text
    from gspo_dist.studies.report import write_report
    from gspo_dist.studies.runner import dry_run, run_study
    from gspo_dist.studies.study import load_study

    study = load_study(
        overrides, conf_dir(), lambda path: plain(OmegaConf.to_container(OmegaConf.load(path)))
    )
    # Every arm is checked before the first one starts: a typing error in the last one must not cost a night.
    for arm in study.arms:
        run_config(study.run_overrides(arm, study.seeds[0]))
    if "--dry-run" in flags:
        print(dry_run(study, lambda chosen: plan_text(run_config(chosen))))
        return
    if "--report-only" not in flags:
        run_study(study)
    command = " ".join(["gspo compare", *overrides])
    try:
        pages = write_report(study, Path(study.dir) / "report", command, html="--html" in flags)
    except OSError as error:  # a full disk, say
        error.add_note(f"the runs are in {study.dir}; `{command} --report-only` draws the report again")
        raise
    for page in pages:
        print(f"report: {page}")
