"""Memory and time of a streamed file: python -m benchmarks.bench_data --rows 10000000 --folder FOLDER

Makes a file of that many rows, indexes it in a process of its own, takes prompts from its cursor, resumes at
another place, and prints seconds and the most memory that the process held. --form parquet: with a million
rows in a row group.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def make(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for start in range(0, rows, 10_000):
            chunk = range(start, min(start + 10_000, rows))
            file.writelines(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in chunk)


def make_parquet(path: Path, rows: int) -> None:
    """In row groups of 2**20 rows, which is pyarrow's own choice for a whole table."""
    import pyarrow
    from pyarrow import parquet

    names = pyarrow.schema([("prompt", pyarrow.string()), ("answer", pyarrow.string())])
    with parquet.ParquetWriter(path, names) as file:
        for start in range(0, rows, 1 << 20):
            chunk = range(start, min(start + (1 << 20), rows))
            columns = [[f"{i}+1=" for i in chunk], [str(i + 1) for i in chunk]]
            file.write_table(pyarrow.table(columns, schema=names), row_group_size=1 << 20)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path) -> None:
    from gspo_dist.coldstart.tokenizer import build_tokenizer
    from gspo_dist.config import DataConfig
    from gspo_dist.data.training import load_training

    tokenizer, before = build_tokenizer(), peak_mb()
    config = DataConfig(train=str(path), heldout=None, stream_above_mb=0)
    begun = time.perf_counter()
    train, _ = load_training(config, tokenizer, max_prompt_tokens=32, seed=0)
    indexed, index_mb = time.perf_counter() - begun, peak_mb()
    cursor = train.cursor(seed=0, shuffle=True)
    begun = time.perf_counter()
    for _ in range(40):
        cursor.prompts(cursor.draw(512))  # as a run asks for them
    taking = time.perf_counter() - begun
    state, following = cursor.state_dict(), [prompt.text for prompt in cursor.next(64)]
    begun = time.perf_counter()
    resumed = train.cursor(seed=0, shuffle=True)
    resumed.load_state_dict(state)
    same = [prompt.text for prompt in resumed.next(64)] == following
    resuming = time.perf_counter() - begun
    print(
        f"{state['prompts']:,} rows, {path.stat().st_size / 2**20:,.0f} MiB: index {indexed:.1f} s; "
        f"20,480 prompts {taking:.2f} s; resumed in {resuming:.2f} s, the same prompts: {same}"
    )
    print(f"peak memory: {before:.0f} MiB before, {index_mb:.0f} with the index, {peak_mb():.0f} at the end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--form", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--measure", type=Path, help="an existing file; what the command itself calls")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    path = options.folder / f"rows_{options.rows}.{options.form}"
    try:
        (make_parquet if options.form == "parquet" else make)(path, options.rows)
        command = [sys.executable, "-m", "benchmarks.bench_data", "--measure", str(path)]
        subprocess.run(command, check=True)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
