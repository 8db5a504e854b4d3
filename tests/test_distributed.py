import pytest
import torch

from harness.distributed import gpu_advice, world_from_environment
from harness.errors import UserError
from tests.conftest import start_ranks


def test_alone_is_one_rank():
    world = world_from_environment("cpu", {})
    assert (world.rank, world.world_size, world.local_world_size, world.launcher) == (
        0,
        1,
        1,
        "alone",
    )


def test_torchrun_variables():
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = world_from_environment("cpu", environment)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 8, 1, 4)


def test_slurm_variables_of_a_step_with_uneven_nodes():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    }
    world = world_from_environment("cpu", environment)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 11, 1, 4)
    assert world.launcher == "slurm"
    last = environment | {"SLURM_NODEID": "2", "SLURM_PROCID": "8", "SLURM_LOCALID": "0"}
    assert world_from_environment("cpu", last).local_world_size == 3


def test_a_batch_script_without_srun_is_alone():
    world = world_from_environment("cpu", {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
    assert world.launcher == "alone"


def test_a_malformed_variable_is_one_line():
    with pytest.raises(UserError, match="torchrun"):
        world_from_environment("cpu", {"RANK": "0"})
    with pytest.raises(UserError, match="torchrun"):
        world_from_environment("cpu", {"RANK": "zero", "WORLD_SIZE": "1"})


def test_advice_on_ranks_against_gpus():
    assert gpu_advice(8, 8) == ""
    assert gpu_advice(1, 8) == "7 of 8 GPUs are idle; to use all: torchrun --nproc-per-node 8"
    assert gpu_advice(7, 8).startswith("1 of 8 GPUs is idle")
    assert "8 ranks on a machine with 2 GPUs" in gpu_advice(8, 2)
    assert "torchrun --nproc-per-node 2" in gpu_advice(8, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")
def test_cuda_without_a_gpu_says_what_to_do():
    with pytest.raises(UserError, match=r"run\.device=cpu"):
        world_from_environment("cuda", {})


REDUCE = """
import torch, torch.distributed as dist
from torch import nn
from functools import partial
from harness.distributed import *
from harness.models.running_statistics import global_running_statistics
from harness.rendezvous import rendezvous
from harness.training.gradients import GradientReducer
from harness.models.ghost_batch_norm import GhostBatchNorm2d

def reduce(world):
    total = sum_over_ranks(torch.tensor([2**53 + 1, world.rank]))  # no float64 holds 2**53 + 1
    least = min_over_ranks(torch.tensor(10 - world.rank))
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, bias=False))
    GradientReducer().register(model)
    model(torch.tensor([[float(world.rank + 1)]])).sum().backward()
    gradient = model.module.weight.grad.item()
    layer = GhostBatchNorm2d(1, worker_batch=2)
    layer.running_mean.fill_(float(world.rank))  # shares 3/4 and 1/4
    with global_running_statistics(layer, (0.75, 0.25)[world.rank]):
        lent = layer.running_mean.item()
    print(total.tolist(), least.item(), gradient, lent, layer.running_mean.item())

def main():  # as in a run, DDP is freed before the interpreter ends: Gloo's thread calls its hook
    world = world_from_environment("cpu")
    with process_group(world, rendezvous(world, 60), 60):
        reduce(world)

main()
"""


def test_reductions_over_two_real_processes():
    processes = start_ranks(2, ["-c", REDUCE])
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # sums: 2 * (2**53 + 1), 0 + 1; least of 10 and 9; gradients 1 + 2 are summed, not averaged;
    # mean over workers 0.75 * 0 + 0.25 * 1, only lent
    expected = "[18014398509481986, 1] 9 3.0 0.25"
    assert [out.strip() for out, _ in outputs] == [f"{expected} 0.0", f"{expected} 1.0"]


ROUNDED = """
import torch
from torch import nn
from harness.distributed import *
from harness.rendezvous import rendezvous
from harness.training.gradients import GradientReducer

def gradients(world, dtype):
    torch.manual_seed(world.rank)
    images = torch.randn(8, 50)
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 40))
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    GradientReducer(dtype).register(ddp)
    ddp(images).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])

def main():
    world = world_from_environment("cpu")
    with process_group(world, rendezvous(world, 60), 60):
        exact = gradients(world, None)
        rounded = gradients(world, torch.bfloat16)
        everywhere = sum_over_ranks(rounded.double().clone())
        assert torch.equal(everywhere, world.world_size * rounded.double())  # equal on all ranks
        difference = (rounded - exact).norm() / exact.norm()
        print(rounded.dtype, torch.equal(rounded, rounded.bfloat16().float()), difference.item())

main()
"""


def test_a_bfloat16_sum_is_the_float32_one_within_its_rounding():
    processes = start_ranks(2, ["-c", ROUNDED])
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    dtype, is_bfloat16, difference = outputs[0][0].split()
    assert (dtype, is_bfloat16) == ("torch.float32", "True")
    # each addend and the sum are rounded to 8 bits, by up to 2**-9, half of that on average
    assert 2**-12 < float(difference) < 2**-8
