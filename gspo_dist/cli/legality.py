"""`gspo legality`: which settings go together, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.cli.exits import fail


def main(args: Sequence[str]) -> None:
    """Prints the table of the objective's settings with its rules, and what exactness is refused with."""
    if args:
        fail(f"gspo legality takes no arguments: got {args[0]!r}", 2)
    from gspo_dist.config import consistency
    from gspo_dist.objectives import age_rules
    from gspo_dist.objectives.legality import format_table

    print(f"{format_table()}\n\n{age_rules.format_rules()}\n\n{consistency.format_rules()}")
