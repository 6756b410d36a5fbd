"""Compile what the calls of every kernel would launch on GPUs, on a machine that has none.

The interpreter runs what compilers refuse: a loop that changes a variable's type, too much
shared memory. A program of its own, because Triton cannot do both in one process.
"""

from functools import partialmethod
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from lightning_sae.kernels.dots import dot_rows
from lightning_sae.kernels.maxima import block_maxima
from lightning_sae.kernels.pairs import pairs_above
from lightning_sae.kernels.sums import sum_rows

SHARED_MEMORY = 227 * 1024  # bytes that a program can have, on Hopper as on Blackwell


def compile_instead(
    kernel: JITFunction, target: GPUTarget, *args: Any, grid: Any, warmup: bool, **options: Any
):
    signature, constants = {}, {}
    for parameter, arg in zip(kernel.params, args, strict=True):
        constant = parameter.is_constexpr or arg is None
        signature[parameter.name] = "constexpr" if constant else mangle_type(arg)
        if constant:
            constants[parameter.name] = arg
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY
    print(kernel.__name__, target.arch, args[0].dtype)


if __name__ == "__main__":  # doctests import every file
    for capability, dtype in (
        (90, torch.float32),  # H100, H200
        (90, torch.bfloat16),
        (100, torch.bfloat16),  # B200, whose matrix products take another way through the compiler
    ):
        target = GPUTarget("cuda", capability, warp_size=32)
        JITFunction.run = partialmethod(compile_instead, target)
        table, numbers = torch.zeros(600, 600, dtype=dtype), torch.zeros(600, dtype=dtype)
        index = torch.arange(600)
        for entries in (500, 600):  # one launch, several
            sum_rows(table, index[:entries], index[:entries], numbers[:entries], 600)
        dot_rows(table, index, table, index)
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            pairs_above(table, table, numbers, None, numbers.float())
            block_maxima(
                table, table, numbers, numbers.float(), numbers.float(), rows_are_tokens=False
            )
