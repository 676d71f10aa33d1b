"""The Ray that a run's actors live in: one of its own on this host, or a cluster that it joins.

Whoever can talk to Ray can run code on its hosts. So a cluster has a token, which Ray 2.60 reads from
RAY_AUTH_TOKEN, from the file that RAY_AUTH_TOKEN_PATH names, or from ~/.ray/auth_token. launch/ray.sh makes
it for a cluster's hosts, and `prepare_token` for a run's own Ray.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import ray

from gspo_dist.config import ClusterConfig
from gspo_dist.host import usable_memory

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Seconds between two looks at the nodes of a cluster that is still growing."""


@dataclass(frozen=True)
class Node:
    """A host of the cluster."""

    node_id: str
    """Ray's name of it, in hexadecimal digits."""
    name: str
    """Its host name."""
    address: str
    """Its address, as the other hosts reach it."""
    cpus: float
    """CPUs that it offers."""
    gpus: float
    """GPUs that it offers."""
    store_bytes: int
    """Size of its object store."""


def start_ray(cluster: ClusterConfig, batch_bytes: int = 0) -> bool:
    """Joins the cluster, or starts one on this host.

    batch_bytes: what the rollouts of a step weigh, for which the object store must have room.

    True when this process must stop it. May be called again. RuntimeError: the cluster cannot be joined.
    """
    if not ray.is_initialized():
        prepare_token(joins=cluster.address is not None)
        if cluster.address is None:
            _start_here(batch_bytes)
            return True
        _join(cluster.address)
    if cluster.address is not None:
        _warn_of_small_stores(batch_bytes)
    return False


def _start_here(batch_bytes: int) -> None:
    # Ray warns on hosts with a small /dev/shm and copies tracebacks here; both belong in its own logs.
    os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray 2.60 runs workers at nice 15, behind anything else on the host; here the workers are the job.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without "local", Ray 2.60 joins what RAY_ADDRESS or /tmp/ray/ray_current_cluster names, dead or alive.
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=object_store_bytes(batch_bytes),
        log_to_driver=False,
        logging_level="error",
    )


def _join(address: str) -> None:
    if address != "auto":
        # Ray 2.60 looks for a token by itself for "auto" only, and not for an address.
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise RuntimeError(
            f"Ray at cluster.address={address} cannot be joined: {error}. Is the head up (`ray status`)? If "
            f"lines above say InvalidAuthToken, this host has {token_source()}, and the head another one: "
            "see launch/README.md"
        ) from error


def stop_ray() -> None:
    """Ends what `start_ray` started."""
    ray.shutdown()


def prepare_token(*, joins: bool) -> None:
    """Has Ray use a token. A Ray of one's own gets one where there is none; RAY_AUTH_MODE decides otherwise.

    Ray 2.60 would make the file itself, readable for everybody. Where the home folder cannot be written, the
    token lives in this environment, which the run's own processes inherit.
    """
    file = token_file()
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        try:
            if file.is_file():
                file.chmod(0o600)
            elif not joins and os.environ.get("RAY_AUTH_MODE", "token") == "token":
                file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
                with os.fdopen(descriptor, "w") as text:
                    text.write(secrets.token_hex(32))
        except OSError:
            if not file.is_file():
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def token_file() -> Path:
    """Where Ray looks for a token that no variable names."""
    return Path.home() / ".ray" / "auth_token"


def token_source() -> str:
    """Where this host's token comes from, in words. The token itself is never shown."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}, so that none is sent"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "a token from RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return f"a token from RAY_AUTH_TOKEN_PATH={path}"
    return f"a token from {token_file()}" if token_file().is_file() else "no token"


def object_store_bytes(batch_bytes: int) -> int:
    """Object store of a run's own Ray: a tenth of the host's memory, at most 2 GiB, and room for a step.

    A step's rollouts lie in the store twice: as the engines return them, and packed for the learner. Weights
    travel elsewhere. The store never takes more than 30% of the memory or half of /dev/shm, which NCCL and
    the weight sync share with it: what does not fit then goes to disk.
    """
    memory = usable_memory()[0]
    usual = min(2 << 30, max(80 << 20, memory // 10))
    most = min(memory * 3 // 10, _shm_bytes() // 2)
    return max(usual, min(usual + 2 * batch_bytes, most))


def _shm_bytes() -> int:
    return shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0


def _warn_of_small_stores(batch_bytes: int) -> None:
    wanted, here = 2 * batch_bytes, nodes()[0]  # every rollout of a step passes through the driver's store
    if here.store_bytes < wanted:
        log.warning(
            "a step's rollouts take up to %.1f GiB of the object store, and %s has %.1f GiB: the rest goes "
            "to its disk; start Ray there with --object-store-memory=%d, and with /dev/shm of twice that",
            wanted / 2**30,
            here.name,
            here.store_bytes / 2**30,
            wanted,
        )


def cluster_gpus() -> float:
    """GPUs of the cluster that this process has joined."""
    return float(ray.cluster_resources().get("GPU", 0))


def nodes() -> list[Node]:
    """The live hosts: the one of this process first, then by address."""
    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(
            node_id=entry["NodeID"],
            name=entry["NodeManagerHostname"],
            address=entry["NodeManagerAddress"],
            cpus=float(entry["Resources"].get("CPU", 0)),
            gpus=float(entry["Resources"].get("GPU", 0)),
            store_bytes=int(entry["Resources"].get("object_store_memory", 0)),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted(found, key=lambda node: (node.node_id != here, _number(node.address), node.node_id))


def _number(address: str) -> tuple[int, int]:
    """Orders addresses as numbers: 10.0.0.9 before 10.0.0.10."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return 0, 0
    return parsed.version, int(parsed)


def await_nodes(cluster: ClusterConfig, *, gpus: bool) -> None:
    """Waits until `cluster.nodes` hosts have joined and, with `gpus`, one of them offers a GPU.

    A cluster whose hosts are all there has the GPUs that it will ever have. RuntimeError, with the way out:
    that took more than `cluster.placement_timeout_s` seconds.
    """
    begin, told, way_out = time.monotonic(), False, "set cluster.device=cpu"
    while True:
        present = nodes()
        whole = cluster.nodes is not None and len(present) >= cluster.nodes
        short = cluster.nodes is not None and not whole
        if not short and (whole or not gpus or any(node.gpus for node in present)):
            return
        wanted = f"{cluster.nodes} hosts (cluster.nodes)" if short else "a GPU"
        there = ", ".join(f"{node.name} ({node.gpus:g} GPUs)" for node in present)
        if time.monotonic() - begin > cluster.placement_timeout_s:
            raise RuntimeError(
                f"the cluster has not got {wanted} within {cluster.placement_timeout_s:.0f} s: there are "
                f"{there}; start Ray on the others, or {'lower cluster.nodes' if short else way_out}"
            )
        if not told:
            log.warning("waiting for %s to join the cluster: there are %s", wanted, there)
            told = True
        time.sleep(POLL_S)
