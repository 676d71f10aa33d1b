"""benchmarks/gpu_check.py without a GPU: its driver with steps that fail in every way, each step as a toy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks import gpu_check, gpu_steps
from benchmarks.gpu_check import PLANS, Plan, report, run_step
from benchmarks.gpu_steps import STEPS, NotHereError, Step
from gspo_dist.actors.placement import lay_out
from gspo_dist.config import RolloutConfig
from gspo_dist.learners import hf_model
from gspo_dist.learners.exact import gpu
from gspo_dist.learners.exact.audit import Difference
from gspo_dist.rollout.policy import HFPolicy
from gspo_dist.rollout.reference import ReferenceEngine
from gspo_dist.trainer import audit
from gspo_dist.trainer.audit import Audit

ROOT = Path(__file__).resolve().parents[2]
FAKE = """
import json, subprocess, sys, time
from pathlib import Path
name, work = sys.argv[1], Path(sys.argv[sys.argv.index("--work") + 1])
result = {"measured": {"speed": 2.0, "card": "a card"}, "expected": [], "skipped": ""}
bound = {"name": "speed", "value": 2.0, "bound": "at least 1", "met": True}
if name == "dies":
    print("the last words")
    sys.exit(3)
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (work / "child").write_text(str(child.pid))
    time.sleep(60)
if name == "slow":
    result["expected"] = [bound | {"bound": "at least 3", "met": False}]
if name == "good":
    result["expected"] = [bound]
if name == "skips":
    result["skipped"] = "no such card"
print("RESULT " + json.dumps(result))
"""


@pytest.fixture
def outcomes(tmp_path, monkeypatch):
    (tmp_path / "gpu_steps.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)

    def run(*names: str):
        return [
            run_step(Plan(name, "as expected", 0.02 if name == "hangs" else 1), "cpu", tmp_path)
            for name in names
        ]

    return run


def test_a_dry_run_lists_the_steps_in_their_order_and_starts_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--dry-run", "--work", str(tmp_path / "w")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*STEPS, "all"]
    assert float(lines[-1].split()[1]) == sum(plan.minutes for plan in PLANS) < 60  # the first hour
    assert all(plan.expected in line for plan, line in zip(PLANS, lines, strict=False))
    assert not (tmp_path / "w").exists()


def test_every_way_to_end_has_its_verdict_and_ends_nobody_else(outcomes):
    found = outcomes("good", "slow", "dies", "skips", "good")
    assert [o.verdict for o in found] == ["pass", "fail", "fail", "skip", "pass"]
    text = report(found, "cpu")
    assert text.startswith("# GPU check: a card\n\n**Failed: slow, dies**\n")
    assert "exit status 3" in text
    assert "the last words" in text
    assert "no such card" in text
    assert "| speed | 2 | at least 3 | **not met** |" in text
    assert "All that ran here is as expected" in report(outcomes("good", "skips"), "cpu")


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_all_that_it_started(outcomes, tmp_path):
    (hung,) = outcomes("hangs")
    assert hung.verdict == "fail"
    assert hung.reason.startswith("no end after")
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, 9)
    raise AssertionError("the step's child lives on")


def test_a_bound_is_met_or_not_and_nan_meets_none(tmp_path):
    step = Step("cpu", tmp_path)
    nan = float("nan")
    for value, bounds in (
        (1.0, {"most": 1.0}),
        (1.1, {"most": 1.0}),
        (nan, {"most": 1.0}),
        (1.0, {"least": 1.1}),
        (nan, {"least": 1.0}),
    ):
        step.expect("x", value, **bounds)
    assert [item["met"] for item in step.expected] == [True, False, False, False, False]


@pytest.mark.slow
def test_host_head_and_eager_run_where_only_torch_and_transformers_are(tmp_path):
    """The first hour may begin before anything else is installed."""
    absent = ("vllm", "ray", "deepspeed", "megatron", "hydra", "omegaconf", "wandb", "matplotlib")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in {absent}:
    sys.modules[name] = None
from pathlib import Path
from benchmarks.gpu_steps import STEPS, Step
for name in ("host", "head", "eager"):
    step = Step("cpu", Path({str(tmp_path)!r}))
    STEPS[name](step)
    print(name, len(step.expected), all(item["met"] for item in step.expected))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["host 0 True", "head 1 True", "eager 3 True"], done.stderr


@pytest.mark.slow
def test_each_backend_computes_one_gradient_twice_in_its_deterministic_mode(tmp_path):
    """In a process of its own, as gpu_check.py runs it: flags of torch stay on."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_steps.py"), "deterministic", "--device", "cpu"]
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert told, done.stderr
    expected = {item["name"]: item for item in json.loads(told[-1].removeprefix("RESULT "))["expected"]}
    for backend in ("eager", "deepspeed", "megatron"):
        assert expected[f"{backend}: gradient values that differ"]["value"] == 0.0
        # 2 layers and 8 experts: every parameter of the toy has a gradient
        assert expected[f"{backend}: values compared"]["value"] > 100_000
        assert expected[f"{backend}: gradient norm"]["value"] > 1e-3


def test_a_learner_that_was_parked_says_the_same(tmp_path):
    step = Step("cpu", tmp_path)
    STEPS["parking"](step)
    assert step.expected[-1]["name"] == "log-probs that changed"
    assert all(item["met"] for item in step.expected)
    assert float(step.measured["GiB moved"]) > 0


@pytest.mark.parametrize("name", ["vllm", "routes"])
def test_the_engines_steps_with_the_reference_engine_in_vllms_place(name, tmp_path, monkeypatch):
    def start(step, record_routing=False):
        config = RolloutConfig(
            engine="reference", precision="fp32", max_prompt_tokens=64, max_completion_tokens=64
        )
        return ReferenceEngine(
            config, HFPolicy(step.model()), name="engine-0", device="cpu", record_routing=record_routing
        )

    monkeypatch.setattr(gpu_steps, "start_engine", start)
    monkeypatch.setattr(gpu_steps, "SAMPLED", 6)
    step = Step("cpu", tmp_path)
    STEPS[name](step)
    assert [item["met"] for item in step.expected] == [True, True], step.expected
    assert float(step.measured["sampled tokens/s"]) > 0
    assert not any("|" in figure for figure in step.measured)  # a cell of the report's tables


@pytest.mark.parametrize(
    ("device", "precision", "equal", "met"), [("cuda", "bf16", 7, False), ("cpu", "fp32", 9, True)]
)
def test_the_exact_step_counts_tokens_and_names_the_operator(
    device, precision, equal, met, tmp_path, monkeypatch
):
    """Engine and learner are asked for the invariant kernels of the step's device, uncompiled."""
    made = {}
    difference = Difference("layer 1 experts", token=3, values=2, largest=0.5)

    def start(step, **options):
        made["engine"] = options
        return SimpleNamespace(close=lambda: made.update(closed=True))

    def load(folder, precision, **options):
        made["learner"] = {"precision": precision, **options}
        return SimpleNamespace(to=lambda device: f"on {device}")

    def compare(engine, policy, asked, completions):
        assert (policy, asked, completions) == (f"on {device}", ["a", "b"], ["first of a", "first of b"])
        return Audit(9, equal, 0.25, True, None if met else difference)

    monkeypatch.setattr(gpu_steps, "start_engine", start)
    monkeypatch.setattr(
        gpu_steps, "sampled", lambda *_: (["a", "b"], [["first of a", "x"], ["first of b", "y"]])
    )
    monkeypatch.setattr(Step, "model", lambda self: tmp_path)
    monkeypatch.setattr(hf_model, "load_policy", load)
    monkeypatch.setattr(audit, "compare", compare)
    step = Step(device, tmp_path)
    STEPS["exact"](step)
    fp32_head = precision == "fp32"
    assert made["engine"] == {"eager": True, "batch_invariant": True, "fp32_head": fp32_head}
    assert made["learner"] == {
        "precision": precision,
        "fp32_head": fp32_head,
        "consistency": "exact",
        "device": device,
    }
    assert made["closed"]
    assert [(item["value"], item["met"]) for item in step.expected] == [(9 - equal, met)]
    assert step.measured["first operator that differs"] == ("none" if met else str(difference))
    assert step.measured["largest difference, nats"] == 0.25


def test_each_family_is_compared_in_both_precisions_and_one_token_is_enough_to_fail(tmp_path, monkeypatch):
    asked = []

    def in_own_process(self, name, *arguments):
        asked.append((name, *arguments))
        differs = 1 if arguments == ("--family", "llama", "--precision", "fp32") else 0
        return {"tokens compared": 40, "first operator that differs": "none", "tokens that differ": differs}

    monkeypatch.setattr(Step, "in_own_process", in_own_process)
    step = Step("cuda", tmp_path)
    STEPS["families"](step)
    known = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in gpu_steps.GPU_FAMILIES}
    assert known == gpu.FAMILIES  # what a learner on a GPU takes, and nothing else
    assert asked == [
        ("exact", "--family", family, "--precision", precision)
        for family in gpu_steps.GPU_FAMILIES
        for precision in ("bf16", "fp32")
    ]
    assert [item["name"] for item in step.expected if not item["met"]] == ["llama fp32: tokens that differ"]
    assert len(step.expected) == 12


def test_a_miniature_is_the_steps_model(tmp_path, monkeypatch, capsys):
    def exact(step):
        config = json.loads((step.model() / "config.json").read_text())
        step.note("model", f"{config['model_type']} {config['dtype']} {step.size.precision}")
        step.note("words", step.size.vocabulary - config["vocab_size"])

    monkeypatch.setitem(STEPS, "exact", exact)
    words = ["exact", "--device", "cpu", "--work", str(tmp_path), "--family", "llama", "--precision", "bf16"]
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", *words])
    assert gpu_steps.main() == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(gpu_steps.RESULT))
    assert told["measured"] == {"model": "llama bfloat16 bf16", "words": 0}


def test_a_step_in_its_own_process_gives_its_figures_or_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "steps.py").write_text(FAKE)
    monkeypatch.setattr(gpu_steps, "__file__", str(tmp_path / "steps.py"))
    step = Step("cpu", tmp_path)
    assert step.in_own_process("good") == {"speed": 2.0, "card": "a card"}
    with pytest.raises(RuntimeError, match=r"^dies --family x ended with 3"):
        step.in_own_process("dies", "--family", "x")


def test_one_token_that_differs_in_training_is_enough_to_fail(tmp_path, monkeypatch):
    rows = [{"mismatch/abs_log_ratio_max": size} for size in (0.0, 1e-7)]
    monkeypatch.setattr(gpu_steps, "run_quickstart", lambda *_: rows)
    step = Step("cuda", tmp_path)
    STEPS["exact_run"](step)
    assert [item["met"] for item in step.expected] == [True, False]


@pytest.mark.parametrize(
    ("name", "device", "knobs"),
    [
        ("sync", "cuda", {"transport": "nccl", "colocated": False}),
        ("sync", "cpu", {"transport": "gloo", "colocated": False}),
        ("colocation", "cuda", {"transport": "auto", "colocated": True}),
        ("exact_run", "cuda", {"transport": "auto", "colocated": True}),
        ("shared", "cuda", {"transport": "auto", "colocated": True}),
    ],
)
def test_the_runs_of_the_last_steps_are_runs_that_a_user_could_start(
    name, device, knobs, tmp_path, monkeypatch
):
    built = []

    class Built:
        release = staticmethod(lambda: None)

    monkeypatch.setattr("gspo_dist.trainer.setup.build.build", lambda config: built.append(config) or Built)
    row = {"sync/probe_mean_abs": 1e-7, "sync/gib_per_s": 2.0, "time/step_s": 3.0}
    rows = [row | {"mismatch/abs_log_ratio_max": 0.0}] * 2

    def train(run):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("gspo_dist.trainer.loop.train", train)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    step = Step(device, tmp_path)
    monkeypatch.setattr(Step, "model", lambda self: tmp_path / "model")
    STEPS[name](step)
    (config,) = built
    assert (config.rollout.weight_sync.transport, config.cluster.colocated) == tuple(knobs.values())
    gpus = 2 if name == "shared" else 1
    assert (config.rollout.engines, config.learner.world_size, config.steps) == (1, gpus, 2)
    assert config.rollout.tensor_parallel == gpus
    if config.cluster.colocated:  # a layout that placement takes
        assert len(lay_out(config.cluster, config.learner, config.rollout, "cuda").learners) == gpus
    exact = name == "exact_run"
    assert (config.learner.consistency == "exact") == config.learner.exact_on_gpu == exact
    assert config.rollout.weight_sync.probe_tolerance is None  # so that the first sync must change nothing
    assert [item["met"] for item in step.expected] == [True, True]


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("sync", "cuda", "needs two GPUs"),
        ("colocation", "cpu", "needs a GPU"),
        ("exact_run", "cpu", "needs a GPU"),
        ("shared", "cuda", "needs two GPUs"),
        ("megatron", "cuda", "needs Transformer Engine on GPUs: it is not installed"),
    ],
)
def test_what_a_host_cannot_do_is_skipped_with_the_reason(name, device, reason, tmp_path):
    with pytest.raises(NotHereError, match=reason):
        STEPS[name](Step(device, tmp_path))
