"""`gspo completion bash`: tab completion of commands, config groups and knobs."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.cli.exits import fail

# hydra answers what may follow: it is asked as if the line were `gspo key`, because it knows no commands.
BASH = r"""
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


def main(args: Sequence[str]) -> None:
    """Prints the shell code that a user evaluates."""
    if list(args) != ["bash"]:
        got = " ".join(args) or "nothing"
        fail(f'completion knows bash: got {got}; run eval "$(gspo completion bash)"', 2)
    from gspo_dist.cli.main import COMMANDS

    print(BASH.replace("COMMANDS_HERE", " ".join(COMMANDS)))
