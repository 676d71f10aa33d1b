"""Training and held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import choose


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out prompts."""

    train: str = "arithmetic"
    """A file (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), a folder of `Dataset.save_to_disk`,
    `hub:NAME`, `reasoning_gym:TASK`, or `arithmetic` (the quickstart's own task)."""
    heldout: str | None = "arithmetic"
    """The same kinds. A file here must not share prompts with `train`. Null: no evaluation."""
    root: str | None = None
    """Folder with local copies of benchmarks, in which `evaluation.suites` look for their data."""
    prompt_key: str = "prompt"
    """Field of a record that holds the question: a text, or a list of chat messages."""
    answer_key: str = "answer"
    """Field of a record that holds the reference answer. A dot goes deeper: reward_model.ground_truth."""
    chat_template: bool = True
    """Apply the tokenizer's chat template to questions given as text, where it has one."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template beside the messages, e.g. {enable_thinking: false}."""
    system_prompt: str | None = None
    """System message put before every question. Null: none."""
    bad_rows: str = "stop"
    """stop | skip (and count): what a run does about a row of a file that is no record."""
    too_long: str = "stop"
    """stop | skip (and count): what a run does about a prompt longer than rollout.max_prompt_tokens."""
    shuffle: bool = True
    """Take the training prompts in an order drawn anew for each pass, instead of the file's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a procedural source (size, number of digits, ...)."""

    def __post_init__(self) -> None:
        choose("data.bad_rows", self.bad_rows, ("stop", "skip"))
        choose("data.too_long", self.too_long, ("stop", "skip"))
