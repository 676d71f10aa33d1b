"""`gspo legality`: which settings of the objective go together, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Sequence

from gspo_dist.cli.exits import fail


def main(args: Sequence[str]) -> None:
    """Prints the table and its rules."""
    if args:
        fail(f"gspo legality takes no arguments: got {args[0]!r}", 2)
    from gspo_dist.objectives.age_rules import format_rules
    from gspo_dist.objectives.legality import format_table

    print(f"{format_table()}\n\n{format_rules()}")
