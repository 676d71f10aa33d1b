"""The Triton kernels compiled ahead of time for real GPUs: what no interpreter shows, and no GPU is needed for.

On a GPU the two passes cost what they move, so the machine code must move each logit once a pass, sixteen bytes a
thread at a time, with nothing spilled to memory and few enough registers to keep a multiprocessor's loads in flight.
"""

import re
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo_dist.learners.head import kernels

THREADS = 32 * kernels.WARPS
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
ALIGNED = [
    ["tt.divisibility", 16]
]  # of pointers torch allocates and of blocks of 128 columns, as the launcher finds


def compiled(kernel, capability, logits, out, bias, entropy=None, aligned=True):
    types = {"logits": f"*{logits}", "out": f"*{out}", "bias": f"*{logits}", "ids": "*i64"}
    types |= {"inverse_temperature": "fp32", "width": "i32"}
    constants = {"HAS_BIAS": bias, "TILE": kernels.TILE} | ({} if entropy is None else {"ENTROPY": entropy})
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    even = {(i,): ALIGNED for i, n in enumerate(names) if signature[n].startswith("*") or n == "width"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even if aligned else {})
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS}
    )


def moved(ptx, direction):
    """Bytes that a thread moves with instructions of sixteen bytes, and how many narrower ones there are."""
    found = re.findall(rf"\b{direction}\.global\S*\.b(\d+)\b", ptx)
    wide = re.findall(rf"\b{direction}\.global\S*\.v4\.b32\b", ptx)
    return 16 * len(wide), len(found) - len(wide)


def resources(program, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize(
    "capability, logits, out",
    [
        pytest.param(80, "bf16", "bf16", id="A100-bf16"),
        pytest.param(90, "bf16", "bf16", id="H100-bf16"),
        pytest.param(90, "fp16", "fp16", id="H100-fp16"),
        pytest.param(90, "fp32", "bf16", id="H100-fp32_head"),
        pytest.param(90, "fp32", "fp32", id="H100-fp32"),
        pytest.param(100, "bf16", "bf16", id="B200-bf16"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_each_logit_is_moved_once_and_wide(capability, logits, out, bias, tmp_path):
    tile = kernels.TILE // THREADS  # logits of a thread
    read = tile * WIDTH[logits] * (2 if bias else 1)
    for entropy in (False, True):
        merge = compiled(kernels._merge_kernel, capability, logits, out, bias, entropy)
        wide, narrow = moved(merge.asm["ptx"], "ld")
        assert wide == read  # in the loop over tiles; outside it the state, the id and the taken logit
        assert narrow == 5 + bias
        assert moved(merge.asm["ptx"], "st") == (0, 4)
        used = resources(merge, tmp_path)
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] <= 64
    gradient = compiled(kernels._gradient_kernel, capability, logits, out, bias)
    assert moved(gradient.asm["ptx"], "ld") == (read, 3)
    assert moved(gradient.asm["ptx"], "st") == (tile * WIDTH[out], 0)
    used = resources(gradient, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 64


def test_the_count_sees_a_kernel_that_moves_narrowly():
    """A width that is no multiple of sixteen cannot be cut into loads of sixteen bytes."""
    program = compiled(kernels._gradient_kernel, 90, "bf16", "bf16", bias=False, aligned=False)
    wide, narrow = moved(program.asm["ptx"], "ld")
    assert wide == 0
    assert narrow > 3
