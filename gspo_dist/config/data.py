"""Training and held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gspo_dist.checks import above, at_least, choose


@dataclass(frozen=True)
class RenewalConfig:
    """A query set that is renewed while the run goes on. Off by default: all prompts are in play."""

    active: int | None = None
    """Training prompts in play at first, drawn by the seed; the others wait. Null: all."""
    arrivals: float = 0.0
    """New prompts that join per step, from those that wait: 0.5 is one every other step."""
    retire_at: float | None = None
    """A prompt leaves for good when its solve rate over all its visits is at least this (ScaleRL's
    no-positive-resampling: 0.9; what is always right: 1). Null: none leaves."""
    retire_after: int = 1
    """Visits before a prompt may leave."""
    replace_retired: bool = True
    """Whether a prompt that waits takes the place of one that left, beside the arrivals."""
    solved_at: float = 1.0
    """Reward from which a completion counts as solved."""
    curriculum: float | None = None
    """Solve rate that is wanted: each pass takes the prompts nearest to it first, new ones before all. Null:
    an order drawn by the seed."""

    def __post_init__(self) -> None:
        at_least("data.renewal.active", self.active, 1)
        at_least("data.renewal.arrivals", self.arrivals, 0.0)
        at_least("data.renewal.retire_after", self.retire_after, 1)
        above("data.renewal.retire_at", self.retire_at, 0.0)
        for name in ("retire_at", "curriculum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"data.renewal.{name} must be a solve rate between 0 and 1: got {value}")
        if self.arrivals and self.active is None:
            raise ValueError(
                f"data.renewal.arrivals brings in prompts that wait: got {self.arrivals} with all of them in "
                "play; set data.renewal.active to how many are in play at first"
            )

    @property
    def is_on(self) -> bool:
        """Whether anything is renewed or ordered by solve rate."""
        return self.active is not None or self.retire_at is not None or self.curriculum is not None


@dataclass(frozen=True)
class DataConfig:
    """Training and held-out prompts."""

    train: str = "arithmetic"
    """A file (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), a folder of `Dataset.save_to_disk`,
    `hub:NAME`, `reasoning_gym:TASK`, or `arithmetic` (the quickstart's own task)."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source -> weight: training prompts of several sources in these shares, in the place of `train`."""
    stream_above_mb: int = 1024
    """Larger files and folders for training (.jsonl, .parquet, save_to_disk) are read as their prompts are
    needed, never as a whole."""
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
    """stop | skip (and count): what a run does about a row of a file that is no record, or whose answer the
    reward cannot read."""
    too_long: str = "stop"
    """stop | skip (and count): what a run does about a prompt longer than rollout.max_prompt_tokens."""
    shuffle: bool = True
    """Take the training prompts in an order drawn anew for each pass, instead of the file's."""
    renewal: RenewalConfig = field(default_factory=RenewalConfig)
    """Which training prompts are in play, and how that changes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of a procedural source (size, number of digits, ...)."""

    def __post_init__(self) -> None:
        at_least("data.stream_above_mb", self.stream_above_mb, 0)
        for source, weight in self.mixture.items():
            above(f"data.mixture.{source}", weight, 0)
        choose("data.bad_rows", self.bad_rows, ("stop", "skip"))
        choose("data.too_long", self.too_long, ("stop", "skip"))
