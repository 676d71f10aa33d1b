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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _nodes(first: int, last: int) -> str:
    return f"node {first}" if first == last else f"nodes {first}-{last}"
