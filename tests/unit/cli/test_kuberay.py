"""A plan as a manifest of KubeRay: what its schema takes, with the numbers of the plan."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from gspo_dist.cli.compose import run_config
from gspo_dist.cli.plan import kuberay_text, main, planned
from gspo_dist.planner.kuberay import job_name

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((Path(__file__).parent / "kuberay_rayjob.json").read_text())
LARGE = ["experiment=qwen3_30b_a3b/gspo", "model.path=/shared/model", "run_dir=runs/My_Run"]


def manifest(*overrides: str, image: str = "registry/gspo:1") -> dict:
    text = kuberay_text(run_config(overrides), overrides, image)
    made = yaml.safe_load(text)
    jsonschema.validate(made, SCHEMA)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_a_layout_becomes_a_pod_per_host_with_all_its_gpus(nodes) -> None:
    layout = f"layout=qwen3_30b_a3b_{nodes}x8"
    made = manifest(*LARGE, layout, "plan.gpu=H200", "data.train='/a b.jsonl'")
    spec = made["spec"]["rayClusterSpec"]
    (workers,) = spec["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [nodes - 1] * 3
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == "2.60.0"
    assert made["metadata"]["name"] == "my-run"
    folder, command = made["spec"]["entrypoint"].split(" && ")
    assert folder == "cd /shared"
    overrides = [*LARGE, layout, "data.train='/a b.jsonl'"]  # what the run itself reads of them
    assert shlex.split(command) == [
        *("gspo", "train", "cluster.address=auto", f"cluster.nodes={nodes}", *overrides)
    ]
    needed = planned(run_config([*LARGE, layout, "plan.gpu=H200"])).host.total / 2**30
    for group in (spec["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/gspo:1"
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert (asked["cpu"], asked["nvidia.com/gpu"], limits) == ("64", "8", {"nvidia.com/gpu": "8"})
        # /dev/shm counts as the pod's memory
        assert needed + 64 <= int(asked["memory"].removesuffix("Gi")) < needed + 65
        shm, shared = group["template"]["spec"]["volumes"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
        assert shared["persistentVolumeClaim"] == {"claimName": "gspo-shared"}
        assert int(group["rayStartParams"]["object-store-memory"]) == 32 << 30
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]


def test_a_run_on_one_cpu_host_has_a_head_alone_and_no_gpus() -> None:
    made = manifest("experiment=quickstart")
    cluster = made["spec"]["rayClusterSpec"]
    assert "workerGroupSpecs" not in cluster
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "limits" not in container["resources"]
    assert "nvidia.com/gpu" not in container["resources"]["requests"]


def test_what_does_not_fit_is_no_manifest() -> None:
    overrides = [*LARGE, "layout=qwen3_30b_a3b_2x8", "plan.nodes=1"]
    with pytest.raises(ValueError, match=r"does not fit, so it is no manifest"):
        kuberay_text(run_config(overrides), overrides, "x")


def test_the_command_prints_the_manifest_and_takes_an_image(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["gspo"])
    main(["experiment=quickstart", "--kuberay=mine:1"])
    made = yaml.safe_load(capsys.readouterr().out)
    assert (
        made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        == "mine:1"
    )
    main(["--kuberay", "experiment=quickstart"])
    assert "image: gspo:gpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name"),
    [("Qwen3_30B/gspo", "qwen3-30b-gspo"), ("7b", "gspo-7b"), ("--", "gspo"), ("a" * 39 + "_b", "a" * 39)],
)
def test_names_are_kubernetes_own(text, name) -> None:
    assert job_name(text) == name


@pytest.mark.parametrize(
    "path",
    [("spec", "rayClusterSpec", "authOptions"), ("spec", "rayClusterSpec", "headGroupSpec"), ("spec",)],
)
def test_the_schema_refuses_a_field_that_kubernetes_would_drop(path) -> None:
    made = manifest("experiment=quickstart")
    wrong = copy.deepcopy(made)
    part = wrong
    for key in path:
        part = part[key]
    part["notAField"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="notAField"):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.slow
def test_the_manifest_in_launch_is_what_its_command_prints(capsys, monkeypatch) -> None:
    """Its first line names the command. Made again by that command, with its output as the file."""
    path = ROOT / "launch/kuberay_qwen3_30b_a3b_4x8.yaml"
    text = path.read_text()
    gspo, plan, *words = shlex.split(text.splitlines()[0].removeprefix("# Made by: "))
    assert (gspo, plan) == ("gspo", "plan")
    monkeypatch.setattr("sys.argv", ["gspo"])
    main(words)
    assert capsys.readouterr().out == text
    made = yaml.safe_load(text)
    jsonschema.validate(made, SCHEMA)
    cluster = made["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["replicas"] == 3
    assert "layout=qwen3_30b_a3b_4x8" in made["spec"]["entrypoint"]
