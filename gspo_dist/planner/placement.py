"""Which processes start where: nodes are filled in order, the learner's ranks first, as actors fill them."""

from __future__ import annotations

from gspo_dist.planner.layout import EngineLayout, LearnerLayout


def engine_nodes(learner: LearnerLayout, engine: EngineLayout, nodes: int, gpus_per_node: int) -> list[int]:
    """The node of each engine that finds room beside the learner's ranks. Nodes count from 1."""
    rooms = [gpus_per_node * (n + 1) - max(learner.world_size, gpus_per_node * n) for n in range(nodes)]
    homes = [n + 1 for n, room in enumerate(rooms) for _ in range(max(0, room) // engine.tensor_parallel)]
    return homes[: engine.engines]


def where(learner: LearnerLayout, engine: EngineLayout, nodes: int, gpus_per_node: int) -> list[str]:
    """One line for each kind of process, and one for the GPUs that stay free. Nodes count from 1.

    Example: 16 ranks and 4 engines of 4 GPUs on 4 x 8 GPUs take nodes 1-2 and nodes 3-4. An engine
    never spans nodes (its GPUs are asked for as one bundle, actors/placement.py), so it may skip a
    node's last GPUs.
    """
    last = -(-learner.world_size // gpus_per_node)
    lines = [f"learner: {_count(learner.world_size, 'rank')} of 1 GPU on {_nodes(1, last)}"]
    free = nodes * gpus_per_node - learner.world_size
    size = engine.tensor_parallel
    if engine.engines and engine.colocated:
        shared = engine.engines * size
        lines.append(
            f"engines: {_count(engine.engines, 'engine')} of {_count(size, 'GPU')}, on the GPUs of the first "
            f"{_count(shared, 'rank')}"
        )
    elif engine.engines:
        homes = engine_nodes(learner, engine, nodes, gpus_per_node)
        lines.append(
            f"engines: {_count(engine.engines, 'engine')} of {_count(size, 'GPU')}, "
            + (f"on {_nodes(homes[0], homes[-1])}" if homes else "on no node")
        )
        if len(homes) < engine.engines:
            lines.append(f"not placed: {_count(engine.engines - len(homes), 'engine')}")
        free -= len(homes) * size
    lines.append(f"free: {_count(max(0, free), 'GPU')}")
    return lines


def gpu_problems(learner: LearnerLayout, engine: EngineLayout, nodes: int, gpus_per_node: int) -> list[str]:
    """Why processes find no place: too few GPUs, or enough of them on no single node."""
    if engine.colocated:
        return _shared_problems(learner, engine, nodes, gpus_per_node)
    needed = learner.world_size + engine.engines * engine.tensor_parallel
    unplaced = engine.engines - len(engine_nodes(learner, engine, nodes, gpus_per_node))
    problems = []
    if needed > nodes * gpus_per_node:
        problems.append(
            f"GPUs: learner.world_size {learner.world_size} and {engine.engines} engines of "
            f"{engine.tensor_parallel} need {needed}, and {nodes} x {gpus_per_node} are there"
        )
    if engine.tensor_parallel > gpus_per_node:
        problems.append(f"GPUs: an engine of {engine.tensor_parallel} does not fit a node of {gpus_per_node}")
    if unplaced and not problems:
        problems.append(
            f"GPUs: {unplaced} of {engine.engines} engines find no node with {engine.tensor_parallel} free "
            f"GPUs beside learner.world_size {learner.world_size} on {nodes} x {gpus_per_node}; add a node, "
            "or choose sizes that fill whole nodes"
        )
    return problems


def _shared_problems(learner: LearnerLayout, engine: EngineLayout, nodes: int, gpus: int) -> list[str]:
    """The same where engines share the GPUs of ranks. gpus: of one node."""
    problems = []
    if learner.world_size > nodes * gpus:
        problems.append(
            f"GPUs: learner.world_size {learner.world_size} needs as many, and {nodes} x {gpus} are there"
        )
    needed = engine.engines * engine.tensor_parallel
    if needed > learner.world_size:
        problems.append(
            "GPUs: colocated engines share the learner's GPUs: got "
            f"{engine.engines} engines of {engine.tensor_parallel} and {learner.world_size} ranks"
        )
    if engine.engines > gpus // engine.tensor_parallel and gpus % engine.tensor_parallel:
        problems.append(
            f"GPUs: a colocated engine of {engine.tensor_parallel} shares the GPUs of consecutive ranks on "
            f"one node: its size must divide {gpus}"
        )
    return problems


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _nodes(first: int, last: int) -> str:
    return f"node {first}" if first == last else f"nodes {first}-{last}"
