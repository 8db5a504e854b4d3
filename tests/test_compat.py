"""harness/compat.py: fails where a dependency changes what it reads."""

import re
import signal
import threading
import time
from datetime import timedelta
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from harness import compat
from tests.conftest import free_port

CPU = torch.device("cpu")


@pytest.mark.parametrize(("largest", "overflow"), [(1.0, 0.0), (float("inf"), 1.0)])
def test_an_overflow_is_found_without_the_scale(largest, overflow):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale((weight * torch.tensor([1.0, 2.0, largest])).sum()).backward()
    scaler.step(optimizer)
    assert compat.found_overflow(scaler, optimizer, CPU).item() == overflow
    assert (weight[0].item() == 1.0) == bool(overflow)  # the update was skipped


@pytest.mark.parametrize(("largest", "overflow"), [(1.0, 0.0), (float("inf"), 1.0)])
def test_the_scaler_leaves_unscaling_and_overflows_to_the_optimizer(largest, overflow):
    seen = []

    class Watching(compat.SelfUnscaling):
        def step(self, closure=None):
            seen.append([*self.scale_and_overflow(), weight.grad[0].item()])

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Watching([weight], {})
    assert optimizer.scale_and_overflow() == (None, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((weight * torch.tensor([1.0, 2.0, largest])).sum()).backward()
    scaler.step(optimizer)
    assert seen == [[4.0, overflow, 4.0]]  # called even after an overflow


def test_each_batch_norm_has_the_base_class():
    for norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(norm, compat.BatchNorm)
    assert not issubclass(nn.GroupNorm, compat.BatchNorm)


def test_all_tensors_become_zero():
    tensors = [torch.ones(2), torch.full((3,), float("inf"))]
    compat.zero_all(tensors)
    assert not any(tensor.any() for tensor in tensors)


def test_the_compilers_settings_hold_within_and_are_restored():
    from torch._dynamo import config

    names = ("recompile_limit", "suppress_errors", "optimize_ddp")
    before = [getattr(config, name) for name in names]
    with compat.compiler_patch(7):
        assert [getattr(config, name) for name in names] == [7, True, False]
    assert [getattr(config, name) for name in names] == before


def test_ddp_has_the_argument_that_stops_it_from_sending_buffers():
    (name,) = compat.buffer_sync_off()
    assert name in signature(DistributedDataParallel).parameters


def test_another_thread_sees_the_main_threads_stack():
    stacks, waiting = [], threading.Event()

    def look():
        waiting.wait()
        time.sleep(0.05)  # until the main thread has entered join
        stacks.append(compat.main_thread_stack())

    thread = threading.Thread(target=look)
    thread.start()
    waiting.set()
    thread.join()
    assert "test_another_thread_sees" in stacks[0] and "thread.join()" in stacks[0]


def test_each_compiled_graph_is_a_phase():
    torch._dynamo.reset()  # which also forgets the phases of earlier tests
    before = compat.compiler_phases()
    torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.ones(3))
    assert compat.compiler_phases() > before


def test_a_lost_peer_is_described_in_one_line():
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:5"
    assert compat.describe_peer_loss(RuntimeError(gloo)) == "Connection closed by peer [::1]:5"
    closed = dist.DistNetworkError("the client socket has failed\nException raised from x.cpp:1")
    assert compat.describe_peer_loss(closed) == "the client socket has failed"
    assert compat.describe_peer_loss(RuntimeError("out of memory")) == ""
    assert compat.describe_peer_loss(ValueError(gloo)) == ""


def test_gloo_begins_its_messages_with_its_source_file(tmp_path):
    """A real error: two ranks in this process, of which one leaves while the other receives."""
    store, groups = dist.FileStore(str(tmp_path / "store"), 2), {}

    def join(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    receiving = groups[0].recv([torch.zeros(1)], 1, 0)
    groups.pop(1)
    with pytest.raises(RuntimeError) as failed:
        receiving.wait()
    lost = compat.describe_peer_loss(failed.value)
    # closed or reset, as the timing of the other end has it
    assert re.search("onnection (closed|reset) by peer", lost) and "\n" not in lost


def test_a_store_whose_port_is_taken_is_recognised():
    port = free_port()
    first = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistNetworkError) as taken:
        dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    assert compat.is_port_in_use(taken.value)
    del first
    with pytest.raises(dist.DistNetworkError) as refused:
        limit = timedelta(seconds=1)
        dist.TCPStore("127.0.0.1", free_port(), is_master=False, timeout=limit)
    assert not compat.is_port_in_use(refused.value)


class Stubborn(Dataset):
    """Its workers ignore SIGTERM, and take a minute over their second item."""

    def __getitem__(self, item):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60 * item)
        return item

    def __len__(self):
        return 2


def test_busy_workers_of_a_dataloader_are_killed(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = DataLoader(
        Stubborn(), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    next(iter(loader))
    (process,) = loader._iterator._workers
    assert process.is_alive()
    compat.kill_workers(loader)
    process.join(5)
    assert process.exitcode == -signal.SIGKILL


def test_a_dataloader_without_workers_has_none_to_kill():
    loader = DataLoader(Stubborn())
    next(iter(loader))
    compat.kill_workers(loader)
    assert next(iter(loader)) is not None  # it still works


def test_dali_mentions_cuda_where_no_image_is_at_fault():
    pytest.importorskip("nvidia.dali")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(1, 1, device_id=0)
    with pipeline:
        pipeline.set_outputs(fn.zeros(device="gpu"))
    with pytest.raises(RuntimeError) as raised:
        pipeline.build()
    assert compat.is_cuda_error(raised.value)
    assert not compat.is_cuda_error(RuntimeError("Error in decoders__ImageSlice: truncated"))


def test_a_dispatch_mode_sees_draws_and_writes():
    seen = []

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((compat.draws_random(func), compat.written_arguments(func, args)))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Mode():
        x.mul(2)
        x.add_(1)
        torch.dropout(x, 0.5, train=True)
    assert seen[0] == (False, [])
    assert seen[1][1][0] is x and not seen[1][0]
    assert any(draws for draws, _ in seen[2:])
