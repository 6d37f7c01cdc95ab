"""Holds reference.py's fake quantisation to ModelOpt's GPU kernel, in Triton's interpreter.

    pip install triton==3.6.0    # 3.9 no longer has the block pointers that the kernel uses
    python check_fake_quantisation.py

The interpreter's conversion to float8 loses the carry into the exponent (124.05 becomes 64, not
128), so PyTorch's takes its place.
"""

import contextlib
import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block
from reference import fake_quantise
from triton.runtime import interpreter

convert = interpreter._convert_float


def correct_convert(values, source, target, rounding):  # noqa: ANN001, ANN201
    """As the interpreter's, but for float8 e4m3."""
    if target != tl.float8e4nv:
        return convert(values, source, target, rounding)
    rounded = torch.from_numpy(values.view(np.float32)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def main() -> None:
    """Prints how many of a million values differ, and in which blocks."""
    interpreter._convert_float = correct_convert
    torch.cuda.device = lambda _: contextlib.nullcontext()  # the launcher wants one
    torch.manual_seed(0)
    for spread in (0, 1, 2):
        block = torch.exp(spread * torch.randn(4096, 16))
        x = torch.randn(4096, 256) * block.repeat_interleave(16, 1)
        amax = 0.7 * x.abs().amax()  # some saturate
        quantiser = SimpleNamespace(amax=amax, block_sizes={-1: 16})
        kernels = fp4_fake_quant_block(x, amax, tile_rows=1024)
        differ = kernels != fake_quantise(x.clone(), quantiser)
        # NVFP4QTensor has 2^-9 as its smallest block scale, the kernel rounds to 0 below.
        tiny = x.view(4096, 16, 16).abs().amax(-1) / 6 < 2**-9 * amax / (6 * 448)
        tiny = tiny.repeat_interleave(16, 1)
        print(
            f"spread {spread}: {int(differ.sum())} differ, {int((differ & ~tiny).sum())} of them "
            f"outside the {int(tiny.sum())} values of blocks below the smallest scale"
        )


if __name__ == "__main__":
    main()
