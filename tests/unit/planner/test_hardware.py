"""GPUs are found by any of their names."""

from __future__ import annotations

import pytest

from gspo_dist.planner import (
    find_gpu,
)


def test_gpus_are_found_by_family_by_name_and_by_what_the_driver_says() -> None:
    assert find_gpu("h100") is find_gpu("NVIDIA H100 80GB HBM3") is find_gpu("H100-80GB")
    assert find_gpu("H20").name == "H20-96GB"
    assert find_gpu("h200").name == "H200-141GB"
    assert find_gpu("NVIDIA A100-SXM4-40GB").name == "A100-40GB"
    with pytest.raises(ValueError, match="A100-40GB, A100-80GB"):
        find_gpu("a100")
    with pytest.raises(ValueError, match="got 'abacus'"):
        find_gpu("abacus")
