"""Names and types of a library's own configuration, read from its source."""

from __future__ import annotations

import ast

import pytest

from gspo_dist.learners.passed import Declared, check_names, fields_of, fits, members_of, own_keys

ENUMS = {"Backend": ["flash", "fused"]}


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("bool", [True], [1, "true", None]),
        ("int", [3], [True, 3.0, "3", None]),
        ("float", [3, 0.5], [True, "1"]),
        ("str", ["a"], [1, None]),
        ("Optional[int]", [None, 2], ["2", False]),
        ("Optional[Literal['uniform', 'block']]", [None, "block"], ["full", 1]),
        ("Optional[List[str]]", [None, [], ["moe"], ("moe",)], ["moe", [1]]),
        ("list[int]", [[1, 2]], [[True], 1]),
        ("Union[str, List[str]]", ["a", ["a"]], [1, [1]]),
        ("torch.dtype", ["bfloat16"], ["bf16", "float64", 1]),
        ("Backend", ["flash"], ["auto", 1]),
        ("Optional[Callable]", [None], [1, "f"]),
        ("Tuple[int, int]", [], [[1, 2]]),
    ],
)
def test_a_value_fits_its_type_and_no_other(kind, good, bad):
    parsed = ast.parse(kind, mode="eval").body
    assert [v for v in good if not fits(v, parsed, ENUMS)] == []
    assert [v for v in bad if fits(v, parsed, ENUMS)] == []


def test_fields_are_those_of_the_installed_classes():
    """pydantic's aliases count too, and private fields do not."""
    zero = Declared("deepspeed", "runtime/zero/config.py", "DeepSpeedZeroConfig")
    found = fields_of([zero])
    assert found is not None
    assert found["prefetch_bucket_size"] == found["stage3_prefetch_bucket_size"] == "int"
    transformer = Declared("megatron", "core/model_parallel_config.py", "ModelParallelConfig")
    both = fields_of([zero, transformer])
    assert both is not None
    assert {"stage", "tensor_model_parallel_size"} <= both.keys()
    assert not [name for name in both if name.startswith("_")]
    backends = members_of(Declared("megatron", "core/transformer/enums.py", "AttnBackend"))
    assert backends == ["flash", "fused", "unfused", "local", "auto"]


def test_without_the_library_only_own_keys_are_known():
    absent = Declared("no_such_package", "config.py", "Config")
    assert fields_of([absent]) is None
    own = own_keys({"set a.b": "one two"})
    check_names("a.more", {"anything": 1}, None, own, "its class")
    with pytest.raises(
        ValueError, match=r"a.more must leave alone what gspo_dist sets itself: got two=1; set a\.b"
    ):
        check_names("a.more", {"two": 1}, None, own, "its class")
