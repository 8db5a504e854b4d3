"""The fused kernel: its numerics (kernel_numerics.py), and that it compiles for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.models.ghost_batch_norm import kernel_device

pytest.importorskip("triton", reason="Triton is built for Linux only")

NUMERICS = Path(__file__).with_name("kernel_numerics.py")


@pytest.mark.parametrize("on", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_numerics(on):
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if on == "interpreter" else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(NUMERICS)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert "skipped" not in ended.stdout


KERNELS = {
    "_partial_statistics": {"BLOCK_R": 32, "BLOCK_C": 64},
    "_finish_statistics": {"EPS": 1e-5, "BLOCK_K": 256, "BLOCK_C": 16},
    "_normalise": {"RESIDUAL": True, "RELU": True, "BLOCK_R": 32, "BLOCK_C": 64},
    "_partial_gradients": {"RESIDUAL": True, "RELU": True, "BLOCK_R": 32, "BLOCK_C": 64},
    "_input_gradient": {"RELU": True, "BLOCK_R": 32, "BLOCK_C": 64},
}


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_an_h100_without_one(name):
    # the interpreter takes what the compiler may refuse; compiling needs no GPU
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from harness.models import ghost_batch_norm_triton

    kernel, constants = getattr(ghost_batch_norm_triton, name), KERNELS[name]
    activations = dict.fromkeys(("x", "y", "g", "dy", "dx", "residual"), "*bf16")
    sums = ("partial", "statistics", "mean", "invstd", "weight", "bias", "sums")
    types = activations | dict.fromkeys(sums, "*fp32") | dict.fromkeys(constants, "constexpr")
    names = [parameter.name for parameter in kernel.params]
    aligned = [["tt.divisibility", 16]]  # as Triton sees of PyTorch's tensors and 64 channels
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): aligned for i, n in enumerate(names) if n in [*activations, *sums, "channels"]
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    if any(name in activations for name in names):
        assert "ld.global.v4.b32" in compiled.asm["ptx"]  # 16 bytes at once: channels_last pays


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_plain_pytorch_is_used():
    assert kernel_device() == ""
