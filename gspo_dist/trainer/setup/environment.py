"""The environment of a run: checked before any process of the run starts, and put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_dist.config import RunConfig
from gspo_dist.data.prompts import PromptSource, readable_prompts
from gspo_dist.data.training import TrainingPrompts
from gspo_dist.environments.pool import LocalEnvironmentPool, describe
from gspo_dist.environments.tools import format_of
from gspo_dist.rewards.reward import readable_by
from gspo_dist.rollout.turns import Bridge, make_bridge, stop_ids
from gspo_dist.trainer.episodes import Episodes


@dataclass(frozen=True)
class CheckedEnvironment:
    """What was found of an environment that can be used."""

    bridge: Bridge
    form: str
    """How the model writes calls of tools."""
    rendering: dict[str, Any]
    """How its prompts are rendered: arguments of `data.chat.render`."""


def check_environment(config: RunConfig, tokenizer: Any) -> CheckedEnvironment | None:
    """None without an environment. ValueError: it cannot be imported, or the chat template has no bridge."""
    environment = config.environment
    if not environment.is_on:
        return None
    stop_ids(tokenizer, environment.stop)
    template = getattr(tokenizer, "chat_template", None)
    chat = bool(config.data.chat_template and template)
    form = format_of(str(template) if template else None)
    schemas = describe(environment, form, config.cluster.env)["tools"]
    bridge = make_bridge(
        tokenizer,
        chat=chat,
        limit=environment.tokens_per_answer,
        role=environment.answer_role,
        keep_history=environment.keep_history,
        template_args=config.data.template_args,
        tools=schemas,
    )
    return CheckedEnvironment(bridge, form, {"tools": schemas, "cue": False} if chat else {})


def judged_train(config: RunConfig, train: TrainingPrompts) -> None:
    """Answers that the reward function cannot read: ValueError, or left out with data.bad_rows=skip."""
    if asks_function(config):
        train.judge(readable_by(config.reward), skip=config.data.bad_rows == "skip")


def judged_heldout(config: RunConfig, heldout: PromptSource) -> PromptSource:
    """`judged_train` of held-out prompts."""
    if not asks_function(config):
        return heldout
    return readable_prompts(heldout, readable_by(config.reward), skip=config.data.bad_rows == "skip")


def asks_function(config: RunConfig) -> bool:
    """Whether reward.function judges completions."""
    return not config.environment.is_on or config.environment.pays != "environment"


def start_episodes(config: RunConfig, checked: CheckedEnvironment | None) -> Episodes | None:
    """The started environments of a run. None without one. Closing its pool ends them."""
    if checked is None:
        return None
    pool = LocalEnvironmentPool(config.environment, checked.form, config.cluster.env)
    pool.start()
    return Episodes(config.environment, pool, checked.bridge)
