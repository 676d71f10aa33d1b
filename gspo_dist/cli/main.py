"""The command `gspo`: its usage, and which file answers which command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gspo_dist.cli.exits import fail

USAGE = """\
usage: gspo COMMAND [arguments]

  train       train a policy
                gspo train experiment=quickstart [overrides]
  compare     arms times seeds, with a report
                gspo compare study=gspo_vs_grpo [overrides]
  evaluate    held-out accuracy of a model, or benchmarks; two results compared
                gspo evaluate model=local model.path=DIR data=file data.heldout=FILE reward=math
                gspo evaluate suite=aime24,livecodebench model=local model.path=DIR data.root=DATA
                gspo evaluate --compare RESULT RESULT
  data        what a run would see of a data source, and where copies contradict one another
                gspo data FILE --model DIR --reward math --against OTHER_FILE
  plan        what a run needs and whether it fits, before paying for GPUs
                gspo plan experiment=qwen3_30b_a3b/gspo layout=qwen3_30b_a3b_4x8
                gspo plan ... --search                  the fastest layouts of these GPUs that fit
                gspo plan ... --calibrate=RUN_DIR       at the speeds of a run of your own
                gspo plan ... --kuberay > job.yaml      the same run for Kubernetes
  export      a run's weights as an HF folder
                gspo export --run RUN_DIR --to FOLDER
  audit       whether engine and learner give one log-prob to every token, and which operator parts them
                gspo audit RUN_DIR
  episodes    a page of a run's episodes, token by token
                gspo episodes RUN_DIR
  make-model  the quickstart's cold-start model, or a pretrained one
                gspo make-model [--recipe smollm] [--to FOLDER]
  upcycle     a dense model's folder as a mixture of experts
                gspo upcycle DENSE FOLDER --experts 4 --top-k 2 --noise 0.02
  workspace   one W&B page for the arms of a study
                gspo workspace --study NAME --to FILE
  legality    which objective, old log-probs, replay and correction go together, and why the rest is refused
  doctor      what works on this host, and what to install for what does not
                gspo doctor --cluster       a line per host of the Ray cluster that this host belongs to
  completion  tab completion in bash
                eval "$(gspo completion bash)"

`gspo train --help` lists the configuration groups; `gspo train --cfg job` prints the resolved configuration;
conf/README.md says how configurations compose, and gspo_dist/config/ documents every knob.
`gspo --version` prints the version.
"""

# Names of modules and not functions, so that a command imports nothing of the others.
COMMANDS = {
    "train": "train",
    "compare": "compare",
    "evaluate": "evaluate",
    "data": "data",
    "plan": "plan",
    "export": "export",
    "audit": "audit",
    "episodes": "episodes",
    "make-model": "make_model",
    "upcycle": "upcycle",
    "workspace": "workspace",
    "legality": "legality",
    "doctor": "doctor",
    "completion": "completion",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: bad input ends with a message and status 2, a failed run with status 1."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
    elif args[0] in ("-V", "--version", "version"):
        import gspo_dist

        print(f"gspo_dist {gspo_dist.__version__}")
    elif args[0] in COMMANDS:
        importlib.import_module(f"gspo_dist.cli.{COMMANDS[args[0]]}").main(args[1:])
    else:
        from gspo_dist.checks import nearest

        fail(f"gspo has no command {args[0]!r}; {nearest(args[0], COMMANDS)}", 2)
