"""Ratings of real CodeForces rounds against CodeElo's own.

    python -m benchmarks.elo_rounds ROUNDS VECTORS TABLE

ROUNDS: a folder of carrot's round files ([handle, points, penalty, rating before, change]). VECTORS: lines of
{round, score, penalty, rank, rating, percentile_2024} that CodeElo's formula gave. TABLE: {rating: count}.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gspo_dist.evaluation import elo


def main(rounds: Path, vectors: Path, table: Path) -> int:
    people = elo.read_table(table)
    equal = total = 0
    for line in vectors.read_text().splitlines():
        wanted = json.loads(line)
        rows = json.loads((rounds / f"carrot_{wanted['round']}-data.json").read_text())
        scores = [(float(points), float(penalty)) for _, points, penalty, _, _ in rows]
        rank = elo.rank_of(wanted["score"], wanted["penalty"], scores)
        rating = elo.rating_at(rank, [row[3] for row in rows])
        found = (rank, rating, elo.percentile(rating, people))
        same = found == (wanted["rank"], wanted["rating"], wanted["percentile_2024"])
        equal, total = equal + same, total + 1
        if not same:
            print(f"{wanted['round']}, score {wanted['score']}: got {found}, published {wanted}")
    print(f"{equal} of {total} ratings, ranks and percentiles are CodeElo's")
    return 0 if equal == total else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("rounds", "vectors", "table"):
        parser.add_argument(name, type=Path)
    sys.exit(main(**vars(parser.parse_args())))
