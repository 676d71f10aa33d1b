"""What the sandboxes of this host make of a folder of hostile and awkward programs.

    python benchmarks/hostile_programs.py FOLDER

FOLDER has manifest.jsonl: {id, kind, file, fn_name, tests: [{input, output}], limits} and `allowed`, the
verdicts that are right.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gspo_dist.sandbox.local import LOCAL, refusal
from gspo_dist.sandbox.protocol import Limits, Outcome, Program, Sandbox

FILLED = {
    "{RANGE_200000}": "\n".join(map(str, range(200_000))),
    "{10**6000}": "1" + "0" * 6000,
}
"""Long texts that the manifest writes short."""
SECRET = ("GSPO_TEST_SECRET", "s3cr3t")


def filled(text: str, port: int) -> str:
    for short, long in {**FILLED, "{PORT}": str(port)}.items():
        text = text.replace(short, long)
    return text


def judged(case: Mapping[str, Any], folder: Path, sandbox: Sandbox, port: int) -> tuple[str, Outcome]:
    """(verdict, how the program ended)."""
    limits = Limits(time_s=case["limits"]["time_s"], memory_mb=case["limits"]["memory_mb"])
    test = {key: filled(text, port) for key, text in case["tests"][0].items()}
    preamble = "from typing import *\n" if case["fn_name"] else ""
    code = (folder / case["file"]).read_text()
    with sandbox.open(Program(code, case["fn_name"], preamble), limits) as run:
        ended = run.run(test["input"])
    if case["fn_name"]:
        same = ended.result is not None and json.loads(ended.result) == json.loads(test["output"])
    else:
        told = [line.strip() for line in ended.stdout.strip().split("\n")]
        same = told == test["output"].strip().split("\n")
    return ("accepted" if ended.status == "ok" and same else "rejected"), ended


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=4, help="programs side by side")
    options = parser.parse_args()
    cases = [json.loads(line) for line in (options.folder / "manifest.jsonl").read_text().splitlines()]
    os.environ[SECRET[0]] = SECRET[1]
    names = [name for name in LOCAL if name != "process" and not refusal(name)]
    found: dict[str, list[tuple[str, Outcome]]] = {}
    connected: dict[str, bool] = {}
    for name in names:
        with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(options.jobs) as pool:
            port = server.getsockname()[1]
            ends = pool.map(lambda case, n=name, p=port: judged(case, options.folder, LOCAL[n], p), cases)
            found[name] = list(ends)
            server.settimeout(0.2)
            try:
                server.accept()
                connected[name] = True
            except TimeoutError:
                connected[name] = False
    print("| program | kind | right verdict | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))
    wrong = 0
    for at, case in enumerate(cases):
        cells = []
        for name in names:
            verdict, ended = found[name][at]
            right = verdict in case["allowed"]
            wrong += not right
            cells.append(f"{verdict}, {ended.status}" + ("" if right else " **wrong**"))
        allowed = " or ".join(case["allowed"])
        print(f"| {case['id']} | {case['kind']} | {allowed} | " + " | ".join(cells) + " |")
    reached = [name for name in names if connected[name]]
    print(
        f"\n{wrong} wrong verdicts. The host's port was reached from: {', '.join(reached) or 'no sandbox'}."
    )


if __name__ == "__main__":
    main()
