"""Laws of the engine's side of a sync that need no engine: what is noted, proven, and packed again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gspo_dist.rollout.vllm import receivers
from gspo_dist.rollout.vllm.receivers import (
    Arrivals,
    BucketInfo,
    Receiver,
    SyncInitInfo,
    repack_cpu_experts,
    repack_cpu_tied_head,
)
from gspo_dist.weights.checksum import device_checksum, host_checksum
from gspo_dist.weights.shm import ShmSource, ShmTransport
from gspo_dist.weights.verify import WeightSyncError


class Model(torch.nn.Module):
    """Two plain parameters, one of them padded from 6 to 8 rows, and one that was cast on loading."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.zeros(4))
        self.embed = torch.nn.Parameter(torch.zeros(8, 2))
        self.cast = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.got: list[str] = []

    @torch.no_grad()
    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.got.append(name)
            place = dict(self.named_parameters()).get(name)
            if place is not None:
                place[: len(tensor)] = tensor


def receiver(model: torch.nn.Module | None = None):
    """A receiver without vLLM's engine around it."""
    made = object.__new__(Receiver)
    made.model, made.arrivals, made.source = model or Model(), Arrivals(), ShmSource()
    made.device, made.model_config = torch.device("cpu"), None
    made.waiting, made.stacks = [], SimpleNamespace(load=lambda tensors: tensors)
    made.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=2, rank=1)
    return made


WEIGHTS = {
    "norm": torch.arange(4.0),
    "embed": torch.arange(12.0).view(6, 2),
    "cast": torch.tensor([1.0, 2.0, 3.0]),
    "fused.part": torch.ones(5, dtype=torch.bfloat16),
}


def deliver(made, tmp_path, weights=WEIGHTS) -> None:
    transport = ShmTransport(folder=tmp_path)
    staged = transport.stage(list(weights.items()))
    made.receive_weights(BucketInfo(**staged.update_info))
    transport.close()


def test_what_arrived_is_noted_and_loaded(tmp_path) -> None:
    made = receiver()
    deliver(made, tmp_path)
    assert made.model.got == list(WEIGHTS)
    report = made.report()
    assert report["checksums"] == {n: host_checksum(t) for n, t in WEIGHTS.items()}
    assert (report["tensors"], report["bytes"]) == (4, 16 + 48 + 12 + 10)
    assert report["seconds_checking"] > 0
    assert made.arrivals.dtypes["fused.part"] is torch.bfloat16
    assert made.arrivals.shapes["embed"] == (6, 2)


def test_a_tensor_that_comes_twice_is_named(tmp_path) -> None:
    made = receiver()
    deliver(made, tmp_path)
    with pytest.raises(WeightSyncError, match="norm arrived twice in one update"):
        deliver(made, tmp_path)


def test_parameters_that_are_kept_as_sent_are_proven_over_their_real_rows(tmp_path) -> None:
    """norm and the six real rows of embed; the cast one and the fused one have nothing to compare with."""
    made = receiver()
    deliver(made, tmp_path)
    made.prove_loaded()
    assert made.report()["proven"] == 2


@pytest.mark.parametrize(("name", "row"), [("norm", 3), ("embed", 5)])
def test_a_parameter_that_differs_after_loading_is_named(name, row, tmp_path) -> None:
    made = receiver()
    deliver(made, tmp_path)
    with torch.no_grad():
        getattr(made.model, name)[row] += 1
    with pytest.raises(WeightSyncError, match=f"{name} arrived whole, but the engine's parameter differs"):
        made.prove_loaded()


def test_padding_may_hold_anything(tmp_path) -> None:
    made = receiver()
    deliver(made, tmp_path)
    with torch.no_grad():
        made.model.embed[6:] = 7
    made.prove_loaded()


def test_without_checks_nothing_is_summed(tmp_path) -> None:
    made = receiver()
    made.init_transfer_engine(SyncInitInfo("shm", check=False))
    deliver(made, tmp_path)
    report = made.report()
    assert (report["checksums"], report["tensors"], report["seconds_checking"]) == ({}, 4, 0.0)


@pytest.mark.parametrize(
    ("device", "checksum", "check", "calls"),
    [
        ("cpu", host_checksum, True, ["finalize", "experts", "head", "prove"]),
        ("cpu", host_checksum, False, ["finalize", "experts", "head"]),
        ("cuda", device_checksum, True, ["finalize", "prove"]),
        ("cuda", device_checksum, False, ["finalize"]),
        ("cuda", host_checksum, True, ["finalize"]),  # a GPU's parameters and bytes of the host
    ],
)
def test_an_update_is_finished_repaired_and_then_proven(device, checksum, check, calls, monkeypatch) -> None:
    made, seen = receiver(), []
    made.source = SimpleNamespace(checksum=checksum)
    made.device, made.check = SimpleNamespace(type=device), check
    monkeypatch.setattr(receivers, "finalize_layerwise_reload", lambda *a: seen.append("finalize"))
    monkeypatch.setattr(receivers, "repack_cpu_experts", lambda model: seen.append("experts"))
    monkeypatch.setattr(receivers, "repack_cpu_tied_head", lambda model: seen.append("head"))
    monkeypatch.setattr(made, "prove_loaded", lambda: seen.append("prove"), raising=False)
    made.finish_weight_update()
    assert seen == calls


def test_a_new_update_forgets_the_one_before(tmp_path, monkeypatch) -> None:
    made = receiver()
    deliver(made, tmp_path)
    monkeypatch.setattr(receivers, "initialize_layerwise_reload", lambda model: None)
    made.start_weight_update()
    assert made.report()["tensors"] == 0
    deliver(made, tmp_path)


def test_experts_of_every_moe_layer_are_packed_and_other_layers_are_left_alone() -> None:
    packed: list[torch.nn.Module] = []
    kernel = SimpleNamespace(
        fused_experts=SimpleNamespace(process_weights_after_loading=lambda layer: packed.append(layer))
    )
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(4)])
    for i in (1, 3):
        model[i].quant_method = SimpleNamespace(moe_kernel=kernel)
    model[2].quant_method = SimpleNamespace()
    repack_cpu_experts(model)
    assert packed == [model[1], model[3]]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_packed_again_only_where_it_is_tied(tied, monkeypatch) -> None:
    """A head of its own is packed by the reload, since its weight arrives."""

    class Embedding(torch.nn.Embedding):
        pass

    class Head(Embedding):
        pass

    monkeypatch.setattr(receivers, "VocabParallelEmbedding", Embedding)
    monkeypatch.setattr(receivers, "ParallelLMHead", Head)
    packed: list[torch.nn.Module] = []
    model = torch.nn.ModuleList([Embedding(4, 2), Head(4, 2)])
    if tied:
        model[1].weight = model[0].weight
    for layer in model:
        layer.quant_method = SimpleNamespace(process_weights_after_loading=packed.append)
    repack_cpu_tied_head(model)
    assert packed == ([model[1]] if tied else [])


def test_every_worker_of_an_engine_meets_under_its_own_number_and_leaves_the_last_meeting(
    monkeypatch,
) -> None:
    made, asked, closed = receiver(), [], []

    def make_source(info, worker):
        asked.append((info, worker))
        number = len(asked)
        return SimpleNamespace(close=lambda: closed.append(number))

    monkeypatch.setattr(receivers, "make_source", make_source)
    told = {"transport": "gloo", "check": True, "meeting": {"port": 7}, "first_rank": 3}
    for _ in range(2):
        made.init_transfer_engine(SyncInitInfo(**told))
    assert asked == [(told, 1)] * 2
    assert closed == [1]
    made.shutdown()
    assert closed == [1, 2]


class Broadcasts:
    """A source whose buckets take their time; notes when each is entered and when it is there."""

    checksum = staticmethod(host_checksum)
    arrives_later = True

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def begin(self, info):
        name = info["path"]
        self.seen.append(f"enter {name}")

        def arrived():
            self.seen.append(f"arrived {name}")
            return [(name, torch.zeros(1))]

        return arrived


def test_a_bucket_is_loaded_while_the_next_one_arrives_and_the_last_at_the_end(monkeypatch) -> None:
    made, seen = receiver(), []
    made.source = Broadcasts(seen)
    monkeypatch.setattr(
        made.model, "load_weights", lambda weights: seen.extend(f"load {n}" for n, _ in weights)
    )
    monkeypatch.setattr(receivers, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(receivers, "finalize_layerwise_reload", lambda *args: seen.append("finalize"))
    monkeypatch.setattr(made, "prove_loaded", lambda: None)
    made.waiting = [("left by an update that broke off", torch.zeros(1))]
    made.start_weight_update()
    for name in ("a", "b"):
        made.receive_weights(BucketInfo({}, path=name))
    made.finish_weight_update()
    assert seen == ["enter a", "arrived a", "enter b", "load a", "arrived b", "load b", "finalize"]
    assert made.report()["tensors"] == 2


def test_a_file_is_loaded_before_its_sender_may_remove_it(tmp_path) -> None:
    made = receiver()
    deliver(made, tmp_path)
    assert (made.model.got, made.waiting) == (list(WEIGHTS), [])
