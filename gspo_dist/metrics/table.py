"""Every key that a run logs: its unit, its meaning, when it is logged, and the module that measures it.

A key with a part that varies is written with a placeholder: `objective/mini_batch_{index}/clip_fraction`.
PLACEHOLDERS says what each stands for. `metrics/names.py` looks keys up here and makes the README of it.
"""

from __future__ import annotations

from dataclasses import dataclass

PLACEHOLDERS = {
    "index": (r"\d+", "number of the mini-batch within its step, from 0"),
    "layer": (r"\d+", "number of the MoE layer, from 0"),
    "lag": (r"\d+", "optimiser steps from the policy that sampled a token to the step's start"),
    "k": (r"\d+", "number of completions"),
    "percent": (r"\d+", "percent of the sequences at or below the value"),
    "engine": (r"engine-\d+", "name of an engine"),
    "suite": (r"[^/]+", "name of the evaluation"),
    "part": (r".+", "name that the reward function gives to a part of its reward"),
}
"""Placeholder -> (regular expression of what it stands for, its meaning)."""


@dataclass(frozen=True)
class Metric:
    """One logged key, or one family of keys."""

    key: str
    """As it is logged; `{layer}` and the like are placeholders."""
    unit: str
    """Of the value. A share lies between 0 and 1."""
    meaning: str
    """What the number counts or averages."""
    when: str = ""
    """Which rows have it; empty: every step."""


@dataclass(frozen=True)
class Section:
    """The keys that one module measures."""

    title: str
    """Heading of the README's section."""
    source: str
    """The module, as a path below gspo_dist."""
    metrics: tuple[Metric, ...]
    """In reading order."""


EPISODES = "runs with an environment"
MEASURED = "steps of which flips are measured (`flips.every`)"
REPLAYED = "runs with Routing Replay"
GUARDED = "objectives with a clip, unless `objective.guard.action=off`"
PROBED = "steps whose weight sync is probed (`rollout.weight_sync.probe_every`)"
SUITES = "steps with an evaluation of `evaluation.suites`"
EVALUATED = "steps with an evaluation (`evaluation.every`, the first and the last)"
REFERENCE = "runs with a KL term (`objective.kl_coef`)"
AHEAD = "runs with `rollout.steps_ahead` above 0"
LONG = "not in metrics.jsonl: console and W&B, every 30 s of a collect that takes longer"
STALE = "steps with tokens of an older policy (`rollout.steps_ahead` above 0)"
SELECTED = "runs with `objective.selection.degenerate=drop` or `mask_truncated`"
REFILLED = "runs with `objective.selection.degenerate=refill`"
RENEWED = "runs with `data.renewal`"
COLOCATED = "runs with `cluster.colocated`"
CORRECTED = "runs with a mismatch correction (`objective.correction`)"

# One entry is one or two lines here; the formatter would make four of it.
# fmt: off
SECTIONS = (
    Section("Rollouts begun ahead", "trainer/pipeline.py", (
        Metric("pipeline/finished_ahead", "completions",
               "Whole completions of later steps, after the publication.", AHEAD),
        Metric("pipeline/unfinished", "completions",
               "Completions in the making that the publication withdrew.", AHEAD),
        Metric("pipeline/carried_tokens", "tokens",
               "Tokens of those, which go on under the new weights.", AHEAD),
        Metric("pipeline/ticks", "decode steps",
               "Of the busiest engine since the publication before.", AHEAD),
    )),
    Section("A long collect", "metrics/sinks.py", (
        Metric("progress/completions", "completions", "Finished in the collect under way.", LONG),
        Metric("progress/tokens", "tokens", "Sampled in the collect under way.", LONG),
        Metric("progress/{engine}/completions", "completions", "The same, of one engine.", LONG),
        Metric("progress/{engine}/tokens", "tokens", "The same, of one engine.", LONG),
    )),
    Section("Health", "trainer/health.py", (
        Metric("health/engine_deaths", "events",
               "Engines that died, hung or broke so far; events.jsonl names each."),
        Metric("health/engine_returns", "events",
               "Engines started in a dead one's place that took part in a publication."),
        Metric("health/reward_deaths", "events",
               "Reward processes that died; what they judged was judged again."),
        Metric("health/environment_deaths", "events",
               "Environment processes that died; their episodes failed or were made again.",
               "runs with an environment, from the first one on"),
        Metric("health/restarts", "events",
               "Times that the run went on by itself after its learner had died."),
    )),
    Section("Step", "metrics/jsonl.py", (
        Metric("step", "steps", "Rollout batches completed. Row 0 is the evaluation before the first step."),
    )),
    Section("Rollouts and rewards", "trainer/step_metrics.py", (
        Metric("rollout/reward_mean", "reward", "Mean reward of the step's rollouts."),
        Metric("rollout/reward_std", "reward", "Population standard deviation of the rewards."),
        Metric("rollout/completion_tokens_mean", "tokens", "Mean length of a completion."),
        Metric("rollout/completion_tokens_max", "tokens", "Length of the longest completion."),
        Metric("rollout/max_completion_tokens", "tokens", "Token limit of the step's completions.",
               "runs with `rollout.length_schedule`"),
        Metric("rollout/truncated_fraction", "share", "Completions cut off at the token limit."),
        Metric("rollout/degenerate_group_fraction", "share",
               "Groups whose rewards are all equal. Such a group has zero advantages and teaches nothing."),
        Metric("rollout/staleness", "optimiser steps",
               "Policy version of the learner before the update, minus the oldest version in the batch."),
        Metric("rollout/staleness_mean", "optimiser steps", "The same, mean over trained tokens."),
        Metric("rollout/staleness_publications", "publications",
               "Weight syncs between the oldest token and the update: at most `rollout.steps_ahead`."),
        Metric("rollout/versions_per_completion", "versions",
               "Policies that sampled a completion, mean over completions. Above 1, some went on over a "
               "weight sync."),
        Metric("rollout/versions_per_completion_max", "versions", "The same, of the completion with most."),
        Metric("reward/{part}", "as the reward function says",
               "Mean of a named part of the reward; a rollout without it counts as 0.",
               "rewards that give parts"),
        Metric("reward/timeout_fraction", "share",
               "Rollouts whose reward function ran past its deadline (`reward.timeout_s`).",
               "steps with such a rollout, where `reward.timeout_reward` is set"),
        Metric("reward/crash_fraction", "share",
               "Rollouts whose reward function ended its process (a crash, or the host's memory).",
               "steps with such a rollout, where `reward.timeout_reward` is set"),
        Metric("reward/error_fraction", "share",
               "Rollouts whose reward function raised, or gave no finite number.",
               "steps with such a rollout, where `reward.error_reward` is set"),
    )),
    Section("Selection", "trainer/selection.py", (
        Metric("selection/left_out_fraction", "share",
               "Rollouts that do not train: groups of equal rewards, completions cut off.", SELECTED),
        Metric("selection/filled_fraction", "share",
               "Of these, rollouts that came back without advantage, because too few were left.", SELECTED),
        Metric("selection/overlong_penalty_mean", "reward",
               "Mean penalty on long completions, which the logged rewards do not contain.",
               "runs with `objective.selection.overlong_penalty`"),
    )),
    Section("Dynamic sampling", "trainer/refill.py", (
        Metric("selection/tries", "tries", "Times that the step asked for groups.", REFILLED),
        Metric("selection/asked_groups", "groups", "Groups that it asked for.", REFILLED),
        Metric("selection/asked_degenerate_fraction", "share",
               "Of those, groups whose rewards are all equal.", REFILLED),
        Metric("selection/asked_reward_mean", "reward",
               "Mean reward over all groups asked for. `rollout/reward_mean` is of those that train.",
               REFILLED),
    )),
    Section("The query set", "data/renewal.py", (
        Metric("data/in_play", "prompts", "Training prompts that may be drawn.", RENEWED),
        Metric("data/waiting", "prompts", "Prompts that have not come into play yet.", RENEWED),
        Metric("data/retired", "prompts", "Prompts that left for their solve rate.", RENEWED),
        Metric("data/solve_rate", "share",
               "Mean over the prompts in play of their solve rate so far; null before a visit.", RENEWED),
    )),
    Section("Turns", "trainer/step_metrics.py", (
        Metric("environment/turns_mean", "turns", "Turns of the policy per episode.", EPISODES),
        Metric("environment/turns_max", "turns", "The same, of the episode with most.", EPISODES),
        Metric("environment/token_fraction", "share",
               "Completion tokens that an environment said; nothing is trained on them.", EPISODES),
        Metric("environment/out_of_turns_fraction", "share",
               "Episodes that ended because `environment.max_turns` was used up.", EPISODES),
        Metric("environment/failed_fraction", "share",
               "Episodes whose environment failed: they have `environment.failure_reward`.", EPISODES),
        Metric("environment/timeout_fraction", "share",
               "The same, because it missed `environment.timeout_s`.", EPISODES),
        Metric("environment/crash_fraction", "share", "The same, because its process ended.", EPISODES),
        Metric("environment/error_fraction", "share", "The same, because it raised.", EPISODES),
        Metric("environment/begun_again", "episodes",
               "Episodes since the run's start that began again, because their environment answered "
               "otherwise when it was played again.", EPISODES),
        Metric("environment/played_again", "episodes",
               "Episodes since the run's start whose environment was made again by its recorded turns, after "
               "its process had ended or the run was resumed.", EPISODES),
    )),
    Section("Advantages and lengths", "objectives/diagnostics.py", (
        Metric("advantage/mean", "advantage", "Mean over rollouts; near 0 by construction."),
        Metric("advantage/std", "advantage", "Population standard deviation over rollouts."),
        Metric("advantage/min", "advantage", "Smallest advantage."),
        Metric("advantage/max", "advantage", "Largest advantage."),
        Metric("advantage/positive_fraction", "share", "Rollouts with a positive advantage."),
        Metric("advantage/negative_fraction", "share", "Rollouts with a negative advantage."),
        Metric("advantage/zero_fraction", "share", "Rollouts with an advantage of exactly 0."),
        Metric("rollout/correct_fraction", "share", "Rollouts with a reward of 1 or more."),
        Metric("rollout/length_correct_tokens", "tokens",
               "Mean length of the completions with a reward of 1 or more; null when there is none."),
        Metric("rollout/length_wrong_tokens", "tokens",
               "Mean length of the completions with a reward below 1; null when there is none."),
    )),
    Section("Packing", "trainer/step_metrics.py", (
        Metric("packing/micro_batches", "micro-batches", "Launched in the step, over all replicas."),
        Metric("packing/efficiency", "share",
               "Packed tokens over the room for them: micro-batches times `learner.token_budget`."),
        Metric("rollout/completion_tokens_total", "tokens",
               "Completion tokens since the first step of the run."),
    )),
    Section("Objective", "objectives/objective.py", (
        Metric("objective/loss", "objective", "The loss, averaged over the step's mini-batches."),
        Metric("objective/policy_loss", "objective", "The loss without its KL term."),
        Metric("objective/kl_loss", "objective", "`kl_coef` times the KL to the reference.", REFERENCE),
        Metric("objective/kl_reference", "nats per token",
               "Estimate of the KL from the policy to the reference, by `objective.kl_estimator`.",
               REFERENCE),
        Metric("objective/clip_fraction", "share",
               "Trained tokens whose gradient the clip removes, over all mini-batches of the step."),
        Metric("objective/clip_fraction_low", "share", "Trained tokens clipped at the lower bound."),
        Metric("objective/clip_fraction_high", "share", "Trained tokens clipped at the upper bound."),
        Metric("objective/clip_fraction_positive", "share", "Of the tokens with a positive advantage."),
        Metric("objective/clip_fraction_negative", "share", "Of the tokens with a negative advantage."),
        Metric("objective/sequence_clip_fraction", "share",
               "Mean over sequences of the share of their tokens that are clipped."),
        Metric("objective/sequence_clip_fraction_positive", "share",
               "Of sequences with a positive advantage."),
        Metric("objective/sequence_clip_fraction_negative", "share",
               "Of sequences with a negative advantage."),
        Metric("objective/mini_batch_{index}/clip_fraction", "share",
               "Clip fraction of one mini-batch. It grows with the index, as the policy moves away."),
        Metric("objective/mini_batch_{index}/clip_fraction_positive", "share",
               "Of the mini-batch's tokens with a positive advantage."),
        Metric("objective/mini_batch_{index}/clip_fraction_negative", "share",
               "Of the mini-batch's tokens with a negative advantage."),
        Metric("objective/mini_batch_{index}/approx_kl_k3", "nats per token",
               "`objective/approx_kl_k3` of one mini-batch."),
        Metric("objective/approx_kl_k1", "nats per token",
               "Mean of `old_logprobs - logprobs`: how far the update has moved the policy. It may be "
               "negative."),
        Metric("objective/approx_kl_k3", "nats per token",
               "Mean of `ratio - 1 - log ratio`: the same distance by an estimator that is never negative."),
        Metric("objective/ratio_mean", "ratio", "Mean of the ratio that was clipped, over trained tokens."),
        Metric("objective/ratio_min", "ratio", "Smallest ratio of a trained token."),
        Metric("objective/ratio_max", "ratio", "Largest ratio of a trained token."),
        Metric("objective/sequence_ratio/q{percent}", "ratio",
               "Quantile over sequences of exp(mean log ratio of the sequence)."),
        Metric("objective/log_ratio_mean", "nats per token",
               "Mean over sequences of their mean log ratio, the policy now against the old log-probs."),
        Metric("objective/log_ratio_std", "nats per token", "Standard deviation over sequences of the same."),
        Metric("objective/advantage_mean", "advantage", "Mean over trained tokens."),
        Metric("objective/entropy", "nats per token", "Mean entropy of the policy at trained tokens."),
        Metric("objective/tokens", "tokens", "Trained tokens of the step."),
        Metric("objective/sequences", "sequences", "Trained sequences of the step."),
        Metric("objective/router_shift", "ratio",
               "Mean over trained tokens of rspo's gamma: 1 where no router has moved.", "objective rspo"),
        Metric("objective/candidates_rest", "probability",
               "Mean over trained tokens of what the engine's likeliest tokens leave of its mass.",
               "objective score_centering"),
        Metric("objective/offset", "nats per token", "What recentring took out of every log ratio."),
        Metric("objective/correction_weight_mean", "weight", "Mean weight of a trained token.", CORRECTED),
        Metric("objective/correction_keep_fraction", "share",
               "Trained tokens that the correction keeps in the loss.", CORRECTED),
    )),
    Section("Old log-probs", "trainer/old_logprobs.py", (
        Metric("old_logprobs/recomputed", "0 or 1",
               "1 when the learner recomputed the old log-probs, 0 when they are the engine's."),
        Metric("old_logprobs/micro_batches", "micro-batches",
               "Forward passes over all replicas, for the learner's log-probs and the reference's. "
               "`learner.forward_token_budget` decides how many.",
               "steps with recomputed old log-probs or a KL term"),
    )),
    Section("Guard over the engine's log-probs", "trainer/guard.py", (
        Metric("guard/offset", "nats per token",
               "Mean over sequences of the mean log ratio in the first mini-batch, before the policy moves: "
               "what the mismatch puts on every sequence. Tokens of older policies are left out."),
        Metric("guard/offset_standard_error", "nats per token", "Standard error of `guard/offset`."),
        Metric("guard/offset_clip_widths", "clip widths",
               "`guard/offset` in widths of the clip on its side. Beyond 1 in size, the mean sequence is "
               "clipped before the policy has moved.", GUARDED),
        Metric("guard/from_probe", "0 or 1",
               "1 when no token was fresh, so that `guard/offset` is of the newest publication's probe."),
        Metric("guard/active", "0 or 1", "1 while the guard acts, or warns.", GUARDED),
        Metric("guard/applied_offset", "nats per token",
               "What the guard has decided to take out of the log ratios; 0 unless it recentres.", GUARDED),
    )),
    Section("Staleness: older policies against the learner's", "objectives/staleness.py", (
        Metric("staleness/token_fraction", "share",
               "Trained tokens that an older policy sampled than the one the step starts from.", STALE),
        Metric("staleness/log_ratio_mean", "nats per token",
               "Mean over sequences with such tokens of their mean log ratio: the learner at the start of "
               "the step against the engine. The mismatch is in it too.", STALE),
        Metric("staleness/log_ratio_std", "nats per token",
               "Standard deviation over sequences of the same.", STALE),
        Metric("staleness/log_ratio_mean/lag_{lag}", "nats per token",
               "The same over the tokens of one lag: what so many optimiser steps have moved the policy.",
               STALE),
        Metric("staleness/outside_clip_fraction", "share",
               "Sequences (tokens, for an objective on token ratios) whose ratio to the engine's log-probs "
               "lies outside of the clip before the update.",
               STALE + ", objectives with a clip"),
        Metric("staleness/ignored", "0 or 1",
               "1 when the ratio ignores the age: recomputed old log-probs, and no correction weighs them "
               "against the engine's.", STALE),
        Metric("staleness/clip_scale", "ratio",
               "How much wider the clip is than its own size, to follow the spread.",
               "runs with `objective.staleness.clip_spreads`"),
    )),
    Section("Mismatch between engine and learner", "objectives/mismatch.py", (
        Metric("mismatch/kl", "nats per token",
               "Mean of `rollout_logprobs - logprobs` at the same weights: KL(engine to learner) by k1. "
               "A step without a fresh token has none of these keys."),
        Metric("mismatch/k3_kl", "nats per token", "The same KL by k3, which is never negative."),
        Metric("mismatch/chi2_token", "1", "Mean of the squared token ratio, minus 1."),
        Metric("mismatch/chi2_sequence", "1", "Mean over sequences of the squared product ratio, minus 1."),
        Metric("mismatch/log_ratio_mean", "nats per token", "Mean over sequences of their mean log ratio."),
        Metric("mismatch/log_ratio_std", "nats per token", "Standard deviation over sequences of the same."),
        Metric("mismatch/ppl_ratio", "ratio",
               "Mean over sequences of the learner's perplexity over the engine's."),
        Metric("mismatch/ess", "share",
               "Effective sample size of the token ratios, as a share of the tokens; 1 is no loss."),
        Metric("mismatch/extreme_fraction", "share",
               "Tokens whose probabilities differ by a factor of more than 2, either way."),
        Metric("mismatch/abs_log_ratio_mean", "nats", "Mean size of a token's log ratio."),
        Metric("mismatch/abs_log_ratio_max", "nats", "Largest size of a token's log ratio."),
        Metric("mismatch/abs_prob_difference_mean", "probability",
               "Mean difference of a token's two probabilities."),
        Metric("mismatch/abs_prob_difference_max", "probability", "Largest such difference."),
        Metric("mismatch/token_mult_prob_error", "ratio", "Mean of exp(size of a token's log ratio)."),
        Metric("mismatch/probability_correlation", "correlation",
               "Pearson correlation of the two probabilities over tokens; null when either is constant."),
    )),
    Section("Routing flips", "routing/flips.py", (
        Metric("routing/engine/flip_fraction", "share",
               "Activated experts that differ, engine against learner at the same weights.", MEASURED),
        Metric("routing/engine/router_flip_fraction", "share",
               "Pairs of token and layer with any expert that differs, engine against learner.", MEASURED),
        Metric("routing/engine/token_flip_fraction", "share",
               "Tokens with any expert that differs in any layer, engine against learner.", MEASURED),
        Metric("routing/engine/flips_per_token", "layers per token",
               "Layers of a token with any expert that differs, engine against learner.", MEASURED),
        Metric("routing/update/flip_fraction", "share",
               "Activated experts that differ, before against after the step's mini-batches.", MEASURED),
        Metric("routing/update/router_flip_fraction", "share",
               "Pairs of token and layer with any expert that differs, before against after.", MEASURED),
        Metric("routing/update/token_flip_fraction", "share",
               "Tokens with any expert that differs in any layer, before against after.", MEASURED),
        Metric("routing/update/flips_per_token", "layers per token",
               "Layers of a token with any expert that differs, before against after.", MEASURED),
        Metric("routing/update/flip_fraction/layer_{layer}", "share",
               "`routing/update/flip_fraction` of one MoE layer.", MEASURED),
        Metric("routing/update/flip_fraction/mini_batch_{index}", "share",
               "Activated experts that differ, before the step against after mini-batch `index`.", MEASURED),
    )),
    Section("Routing Replay", "trainer/step_metrics.py", (
        Metric("routing/replay_bytes", "bytes", "The recorded routes of the step's batch.", REPLAYED),
        Metric("routing/replay_bytes_per_token", "bytes per token", "The same, per token.", REPLAYED),
        Metric("routing/native_row_fraction", "share",
               "Tokens without a recorded route, which the learner routes itself.", REPLAYED),
        Metric("routing/replay_mixed_fraction", "share",
               "Completions whose tokens several policies sampled, each with its own routes: their replay is "
               "exact for each token's moment and not for the prefix that later tokens saw.",
               "runs with `objective.routing_replay=r3`"),
        Metric("routing/replay_recorded_bytes", "bytes", "Written where the experts are chosen.", REPLAYED),
        Metric("routing/replay_host_held_bytes", "bytes",
               "In host memory from recording to the last mini-batch.", REPLAYED),
        Metric("routing/replay_wire_bytes", "bytes",
               "Moved between processes: to the trainer and back.", REPLAYED),
        Metric("routing/replay_device_copies_bytes", "bytes",
               "Moved between host and device, both ways.", REPLAYED),
    )),
    Section("Balance of the experts", "learners/megatron/balance.py", (
        Metric("routing/max_violation", "share of the mean load",
               "Load of the busiest expert over the mean load, minus 1; the worst layer.",
               "MoE models with `learner=megatron`"),
        Metric("routing/mean_violation", "share of the mean load",
               "The same, mean over layers.", "MoE models with `learner=megatron`"),
        Metric("routing/dead_experts", "experts",
               "Without a token in a mini-batch, over all layers; mean.",
               "MoE models with `learner=megatron`"),
        Metric("routing/layer_{layer}/max_violation", "share of the mean load",
               "Of one MoE layer.", "MoE models with `learner=megatron`"),
        Metric("routing/layer_{layer}/dead_experts", "experts",
               "Without a token, in one MoE layer.", "MoE models with `learner=megatron`"),
        Metric("routing/layer_{layer}/max_load_fraction", "share",
               "The busiest expert's part of the load.", "MoE models with `learner=megatron`"),
        Metric("routing/layer_{layer}/min_load_fraction", "share",
               "The idlest expert's part of the load.", "MoE models with `learner=megatron`"),
        Metric("routing/aux_loss", "objective",
               "The auxiliary loss, mean over layers (`learner.megatron.aux_loss_coef`).",
               "MoE models with `learner=megatron`"),
    )),
    Section("Learner", "trainer/step_metrics.py", (
        Metric("learner/grad_norm", "gradient",
               "Global L2 norm of the gradient before clipping, mean over the step's mini-batches without "
               "skipped ones."),
        Metric("learner/skipped_steps", "optimiser steps",
               "Mini-batches of the step whose gradient was not finite. They change no weight."),
        Metric("learner/loss_scale", "factor",
               "What the loss of the step's last mini-batch was multiplied by before its backward pass.",
               "`learner.precision=fp16`"),
        Metric("learner/lr", "learning rate", "That of the step's last mini-batch."),
        Metric("learner/policy_version", "optimiser steps", "Completed after this step."),
    )),
    Section("Weight sync", "trainer/publisher.py", (
        Metric("sync/bytes", "bytes", "Weights that the learner sent in one publication."),
        Metric("sync/gib_per_s", "GiB per second", "`sync/bytes` over the whole publication's time."),
        Metric("sync/check_fraction", "share", "Part of the publication that checksums took."),
        Metric("sync/probe_mean_abs", "nats per token",
               "Mean size of the difference of log-probs, engine against learner; the worst engine.", PROBED),
        Metric("sync/probe_max_abs", "nats",
               "Largest difference of a token's log-prob; the worst engine.", PROBED),
        Metric("sync/probe_stops_above", "nats per token",
               "Mean difference above which the probe would have stopped the run.", PROBED),
        Metric("time/sync/start_s", "seconds", "Until every engine was ready to receive."),
        Metric("time/sync/send_s", "seconds", "Gathering, staging and delivering all buckets."),
        Metric("time/sync/finish_s", "seconds", "Until every engine answered, and the check."),
    )),
    Section("Time of a step", "trainer/clock.py", (
        Metric("time/step_s", "seconds", "The whole step, without evaluation and checkpoint."),
        Metric("time/collect_s", "seconds", "Sampling the rollouts."),
        Metric("time/reward_s", "seconds", "Verdicts that were still to come when all were sampled."),
        Metric("time/pack_s", "seconds", "Advantages and packing."),
        Metric("time/old_logprobs_s", "seconds",
               "Old and reference log-probs, the guard's subset, m2po's pass."),
        Metric("time/attach_routes_s", "seconds",
               "Copying recorded routes into mini-batches (`routing_replay=r3`)."),
        Metric("time/update_s", "seconds", "Forward, backward and optimiser of all mini-batches."),
        Metric("time/flips_s", "seconds", "Measuring routing flips."),
        Metric("time/sync_s", "seconds", "Publishing the weights, probe included."),
        Metric("time/other_s", "seconds", "The rest of the step."),
    )),
    Section("Hand-overs of shared GPUs", "trainer/sharing.py", (
        Metric("time/switch_s", "seconds",
               "Learner and engines handing the GPUs to each other, since the row before. A part of "
               "`time/sync_s` and `time/other_s`; that of a checkpoint stands in the next row.", COLOCATED),
        Metric("time/switch/learner_sleep_s", "seconds",
               "Of it: the learner's memory to the host.", COLOCATED),
        Metric("time/switch/learner_wake_s", "seconds", "Of it: the learner's memory back.", COLOCATED),
        Metric("time/switch/engines_sleep_s", "seconds", "Of it: engines give their memory up.", COLOCATED),
        Metric("time/switch/engines_wake_s", "seconds", "Of it: engines take it back.", COLOCATED),
    )),
    Section("Time outside the steps", "trainer/loop.py", (
        Metric("time/evaluation_s", "seconds", "The held-out evaluation after the step.", EVALUATED),
        Metric("time/suites_s", "seconds", "What the run waited for benchmark suites.", SUITES),
        Metric("time/left_s", "seconds", "Estimate of the time to the last step."),
    )),
    Section("Speed", "trainer/step_metrics.py", (
        Metric("perf/tokens_per_s", "tokens per second", "Completion tokens over `time/step_s`."),
        Metric("perf/collect_tokens_per_s", "tokens per second", "Completion tokens over `time/collect_s`."),
        Metric("perf/update_tokens_per_s", "tokens per second",
               "Prompt and completion tokens over `time/update_s`."),
    )),
    Section("Evaluation", "evaluation/suite.py", (
        Metric("eval/heldout/accuracy", "share", "Right completions; the same as avg@k.", EVALUATED),
        Metric("eval/{suite}/avg@{k}", "share",
               "Right completions over prompts with k completions each.", EVALUATED),
        Metric("eval/{suite}/avg@{k}_standard_error", "share",
               "Standard error of avg@k with the prompts as clusters.",
               EVALUATED + ", with two prompts or more"),
        Metric("eval/{suite}/pass@{k}", "share",
               "Prompts that one of k completions solves, by the unbiased estimator.", EVALUATED),
        Metric("eval/{suite}/reward_mean", "reward", "Mean reward of the completions.", EVALUATED),
        Metric("eval/{suite}/completion_length_mean_tokens", "tokens",
               "Mean length of a completion.", EVALUATED),
        Metric("eval/{suite}/truncated_fraction", "share",
               "Completions cut off at the token limit.", EVALUATED),
        Metric("eval/at_step", "steps",
               "Whose policy the suites of this row are of: the step before, where engines answer beside the "
               "learner.", SUITES),
        Metric("eval/{suite}/problems", "problems", "Problems of the suite.", SUITES),
        Metric("eval/{suite}/elo", "rating", "CodeForces rating: mean over contests with standings.", SUITES),
        Metric("eval/{suite}/elo_standard_error", "rating",
               "Standard error of it over contests.", SUITES + ", with two contests or more"),
        Metric("eval/{suite}/elo_percentile", "percent",
               "People in the table of ratings whose rating is lower.", SUITES + ", with a table"),
        Metric("eval/{suite}/elo_contests", "contests", "Contests that the rating is a mean of.", SUITES),
    )),
)
# fmt: on
