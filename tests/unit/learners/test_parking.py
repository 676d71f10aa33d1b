"""A learner's memory moved away and back: what moves, and that it comes back bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gspo_dist.learners.parking import Held, Parking, tensors_below

CPU = torch.device("cpu")


def parking(weights=(), others=()) -> Parking:
    return Parking(SimpleNamespace(held=lambda: Held(CPU, list(weights), list(others))))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


def test_every_bit_comes_back_and_views_stay_views():
    """Of NaNs with a payload, of negative zeros and of infinities too."""
    flat = torch.tensor([0x7FC00123, -(1 << 31), 0x7F800000, 3, 4, 5], dtype=torch.int32).view(torch.float32)
    view, before = flat[2:5], bits(flat)
    parked = parking(others=[{"moments": [view]}])
    assert parked.sleep() == 24  # the storage, of which the view is a part
    assert flat.untyped_storage().nbytes() == 0
    assert parked.sleep() == 0
    assert parked.wake_up() == 24
    assert bits(flat) == before
    view.fill_(7.0)
    assert flat.tolist()[2:5] == [7.0] * 3
    assert parked.wake_up() == 0


def test_weights_stay_for_a_publication_also_where_the_optimizer_holds_them_too():
    weights, masters, gradients = torch.ones(8), torch.full((8,), 2.0), torch.zeros(8)
    optimizer = torch.optim.AdamW([masters])
    optimizer.param_groups[0]["model weights"] = weights[:4]
    parked = parking([weights], [optimizer, gradients])
    assert parked.sleep(keep_weights=True) == 64
    assert weights.tolist() == [1.0] * 8
    parked.require(states=False)
    with pytest.raises(RuntimeError, match="states are in host memory: wake it up"):
        parked.require()
    assert parked.sleep() == 32
    assert parked.wake_up(weights_only=True) == 32
    parked.require(states=False)
    assert parked.wake_up() == 64
    parked.require()
    assert (masters.tolist(), gradients.tolist()) == ([2.0] * 8, [0.0] * 8)


def test_zeros_cost_no_host_memory_and_buffers_are_used_again():
    gradients, moments = torch.zeros(1000), torch.ones(10)
    parked = parking(others=[gradients, moments])
    parked.sleep()
    buffers = parked._buffers
    assert sum(buffer.nbytes for buffer in buffers.values()) == 40  # an assertion that fails prints no tensor
    parked.wake_up()
    moments.add_(1.0)
    first = [buffer.data_ptr() for buffer in buffers.values()]
    parked.sleep()
    assert [buffer.data_ptr() for buffer in parked._buffers.values()] == first
    parked.wake_up()
    assert (gradients.any().item(), moments.tolist()) == (False, [2.0] * 10)


def test_what_no_longer_lives_keeps_no_buffer():
    held: list[torch.Tensor] = [torch.ones(4)]
    parked = parking(others=[held])
    parked.sleep()
    parked.wake_up()
    held[0] = torch.ones(8)
    parked.sleep()
    assert [buffer.nbytes for buffer in parked._buffers.values()] == [32]
    parked.wake_up()


def test_tensors_are_found_in_modules_optimizers_and_on_parameters():
    model = torch.nn.Linear(2, 2)
    model.weight.main_grad = torch.full((2, 2), 3.0)
    model.weight.grad = torch.full((2, 2), 4.0)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    found = {id(tensor) for tensor in tensors_below([{"deep": (optimizer,)}])}
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    wanted = [model.weight, model.weight.main_grad, model.weight.grad, *moments]
    assert {id(tensor) for tensor in wanted} <= found
    assert id(model.bias) in found  # of a parameter group


def test_what_a_modules_forward_pass_keeps_beside_its_weights_stays():
    """Megatron's dispatchers hold indices as plain attributes, which log-probs need too."""
    model = torch.nn.Linear(2, 2)
    model.order = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.model = model  # as DistributedOptimizer holds its chunks
    parked = parking(list(model.parameters()), [optimizer, model])
    parked.sleep()
    assert model.order.tolist() == [0, 1, 2, 3]
    parked.wake_up()
