"""The samples of a suite on disk: one line per graded completion, so that an interrupted run goes on.

FOLDER/SUITE/setting.json    what must be equal for the samples to belong together
FOLDER/SUITE/samples.jsonl   a line per sample, as they are graded
FOLDER/SUITE/result.json     figures, notes and every sample, when all are there
FOLDER/SUITE/failures.html   what a reader looks at
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gspo_dist.files import write_text

Key = tuple[str, int]
"""(problem, sample)."""


class SampleStore:
    """The graded samples of one suite. Made once per run of a suite."""

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        """Opens the folder, with the samples that an earlier run of the same setting left in it.

        Raises ValueError where the folder holds samples of another setting.
        """
        self.folder, self.setting = folder, dict(setting)
        self.path = folder / "samples.jsonl"
        self.samples: dict[Key, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._check_setting()
        self._read()

    def _check_setting(self) -> None:
        file = self.folder / "setting.json"
        now = json.loads(json.dumps(self.setting))
        if not file.is_file():
            write_text(file, json.dumps(now, indent=1) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differ:
            first = differ[0]
            raise ValueError(
                f"{self.folder} holds samples of another setting ({', '.join(differ)} differ): got {first} = "
                f"{str(now.get(first))[:120]}, it has {str(before.get(first))[:120]}; take another run_dir, "
                "or remove the folder"
            )

    def _read(self) -> None:
        """The lines that are whole. A last one that a kill has torn is cut off."""
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for line in whole.splitlines():
            sample = json.loads(line)
            self.samples[sample["problem"], sample["sample"]] = sample

    def add(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Writes graded samples. Raises OSError where they cannot be written."""
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                self.samples[sample["problem"], sample["sample"]] = dict(sample)
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
