"""A planned run as a Kubernetes manifest: a RayJob of the KubeRay operator, 1.5.1 or later.

One pod per host, each with all GPUs of its host, as launch/ray_head.sh and launch/ray_worker.sh would start
them. The operator makes the cluster's token (`authOptions`), waits for the head and submits the run to it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

SHARED = "/shared"
"""Where the volume that all hosts share is mounted. Relative paths of the run lie below it."""
CLAIM = "gspo-shared"
"""The claim of that volume. It must allow many writers (ReadWriteMany)."""
CPUS_PER_GPU = 8
"""CPUs that a pod asks for with each GPU: a rank or an engine, its threads, and a share of the rewards."""
CPUS_PER_CPU_HOST = 4
"""CPUs that a pod without GPUs asks for."""
KEPT_S = 600
"""Seconds for which pods stay after the run, so that their logs can be read."""
RETRIES = 2
"""Times that a failed run is begun again. It goes on from its newest checkpoint."""
NAME_LENGTH = 40
"""KubeRay appends to a job's name, and Kubernetes takes 63 characters."""


def ray_job(
    name: str,
    command: Sequence[str],
    *,
    image: str,
    ray_version: str,
    nodes: int,
    gpus_per_node: int,
    memory_gib: int,
    shm_gib: int,
) -> dict[str, Any]:
    """The manifest of `command`, `gspo train` with its overrides, on `nodes` hosts.

    memory_gib: host memory of a pod without what it keeps in /dev/shm, which counts as its memory too.
    """
    pod = _pod(image, gpus_per_node, memory_gib + shm_gib, shm_gib)
    # Ray takes half of /dev/shm for its objects (launch/ray.sh says why). KubeRay wants texts here.
    start = {"object-store-memory": str((shm_gib << 30) // 2)}
    cluster: dict[str, Any] = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": start, "template": pod},
    }
    if nodes > 1:
        # The run waits for all of them (cluster.nodes), and none is added or taken away.
        cluster["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": nodes - 1,
                "minReplicas": nodes - 1,
                "maxReplicas": nodes - 1,
                "rayStartParams": dict(start),
                "template": _pod(image, gpus_per_node, memory_gib + shm_gib, shm_gib),
            }
        ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job_name(name)},
        "spec": {
            "entrypoint": f"cd {SHARED} && {shlex.join(command)}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "backoffLimit": RETRIES,
            "rayClusterSpec": cluster,
        },
    }


def job_name(text: str) -> str:
    """`text` as Kubernetes takes it. Example: Qwen3_30B/gspo becomes qwen3-30b-gspo."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return name if name[:1].isalpha() else f"gspo-{name}".strip("-")


def _pod(image: str, gpus: int, memory_gib: int, shm_gib: int) -> dict[str, Any]:
    # No limit on CPUs and memory: a plan estimates, and a limit would kill the run that passes the estimate.
    cpus = gpus * CPUS_PER_GPU or CPUS_PER_CPU_HOST
    resources: dict[str, Any] = {"requests": {"cpu": str(cpus), "memory": f"{memory_gib}Gi"}}
    if gpus:
        resources["requests"]["nvidia.com/gpu"] = str(gpus)
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    # Read where Ray starts (launch/ray.sh): no niceness, and actors without GPUs leave them visible.
    env = {
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    container: dict[str, Any] = {
        "name": "ray",
        "image": image,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "resources": resources,
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "shared", "mountPath": SHARED},
        ],
    }
    if gpus:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # RDMA pins memory
    return {
        "spec": {
            "containers": [container],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
                {"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}},
            ],
        }
    }
