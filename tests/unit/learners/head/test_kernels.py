"""The Triton kernels: their arithmetic in Triton's interpreter, and their machine code for
real GPUs, without one.

On a GPU the two passes cost what they move. So the machine code must move each logit once per pass, sixteen
bytes per thread at a time, with nothing spilled to memory and few enough registers to keep a multiprocessor's
loads in flight. Compiling ahead of time shows that, which no interpreter does.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gspo_dist.learners.head import kernels

THREADS = 32 * kernels.WARPS
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the launcher finds of pointers that torch allocates, and of blocks of 128 columns.
ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel, capability, logits, out, bias, entropy=None, aligned=True):
    types = {"logits": f"*{logits}", "out": f"*{out}", "bias": f"*{logits}", "ids": "*i64"}
    types |= {"inverse_temperature": "fp32", "width": "i32"}
    constants = {"HAS_BIAS": bias, "TILE": kernels.TILE} | ({} if entropy is None else {"ENTROPY": entropy})
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    even = {(i,): ALIGNED for i, n in enumerate(names) if signature[n].startswith("*") or n == "width"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=even if aligned else {})
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernels.WARPS, "enable_fp_fusion": kernels.FP_FUSION},
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
    ("capability", "logits", "out"),
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


_TRITON_CHECK = """
import torch
from gspo_dist.learners.head import kernels
from gspo_dist.learners.head.logprobs import taken_logprobs
kernels.TILE = 16  # several tiles a row at these sizes
g = torch.Generator().manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):  # the interpreter truncates bfloat16
    for bias in (False, True):
        for chunk in (1, 3, 20):
            shapes = ((9, 5), (77, 5), (77,))
            leaves = [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in shapes]
            ids, up = torch.randint(77, (9,), generator=g), torch.randn(9, generator=g)
            ids[:3] = torch.tensor([0, 76, 40])
            results = []
            for name in ("triton", "chunked"):
                b = leaves[2] if bias else None
                o = taken_logprobs(leaves[0], leaves[1], ids, bias=b, temperature=0.7, chunk_tokens=chunk,
                                   kept_bytes=9 * 77, implementation=name)
                grads = torch.autograd.grad((o.logprobs * up).sum(), leaves[: 2 + bias])
                results.append([o.logprobs, o.entropy, *grads])
            for i, (a, e) in enumerate(zip(*results, strict=True)):
                limit = 3e-6 if i < 2 else tolerance
                torch.testing.assert_close(a, e, rtol=limit, atol=limit)
h, w = torch.zeros(0, 5, requires_grad=True), torch.randn(77, 5, requires_grad=True)
taken_logprobs(h, w, torch.zeros(0, dtype=torch.int64), implementation="triton").logprobs.sum().backward()
assert not w.grad.any()
print("agree")
"""


@pytest.mark.slow
def test_triton_kernels_equal_the_chunked_passes():
    """The kernels' own code in Triton's interpreter, whose switch is read when triton is first imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _TRITON_CHECK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[4],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agree" in done.stdout
