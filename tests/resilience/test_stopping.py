import ast
import os
import pty
import signal
import subprocess
import sys

import pytest

from harness.data.loaders.child_process import worker_processes
from harness.resilience.agreement import Agreement
from harness.resilience.stopping import StopRequest
from harness.resilience.unfailing_output import unfailing_output
from tests.conftest import start_ranks


def test_a_signal_only_sets_a_flag_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1)
    request = StopRequest()
    with request.listen():
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_ctrl_c_that_the_launcher_forwards_is_no_second_one():
    request = StopRequest()
    with request.listen():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # within the two seconds: this process lives on
        assert request.signal == signal.SIGINT


def test_alone_the_answer_is_immediate():
    assert Agreement(None).after_step(stop=True, checkpoint=False) == (True, False)


AGREE = """
import sys
from harness.distributed import process_group, world_from_environment
from harness.resilience.agreement import Agreement
from harness.rendezvous import rendezvous
world = world_from_environment("cpu")
step_s = [float(word) for word in sys.argv[1:]][world.rank]
with process_group(world, rendezvous(world, 60), 60) as control:
    step = 0
    agreement = Agreement(control, clock=lambda: step * step_s)
    wishes, answers = [False, False], {}
    for step in range(44):
        if (world.rank, step) == (1, 3):
            wishes[0] = True
        if (world.rank, step) == (0, 0):
            wishes[1] = True
        answer = agreement.after_step(*wishes)
        wishes = [wish and not agreed for wish, agreed in zip(wishes, answer)]
        if any(answer):
            answers[step] = answer
    agreement.close()
    print(answers)
"""


def agreed(*step_s):
    """What the ranks were answered, step by step; of ranks whose steps take so long."""
    processes = start_ranks(2, ["-c", AGREE, *map(str, step_s)])
    outputs = [process.communicate()[0].strip() for process in processes]
    assert outputs[0] == outputs[1]
    return ast.literal_eval(outputs[0])


SAVE, STOP = (False, True), (True, False)


def test_one_ranks_wish_is_every_ranks_answer_one_long_step_later():
    """A wish that stands until its answer comes is answered once."""
    assert agreed(1.2, 1.2) == {1: SAVE, 4: STOP}


def test_short_steps_share_a_message():
    """Of 0.4 s: 2 in a second. Messages at steps 0, 1, 2 (the first that knows how
    long a step takes was sent at 1), then at 4, 6: the wish of step 3 is sent at 4."""
    assert agreed(0.4, 0.4) == {1: SAVE, 6: STOP}


def test_the_slowest_ranks_steps_count():
    assert agreed(1.2, 0.01) == agreed(0.01, 1.2) == {1: SAVE, 4: STOP}


def test_a_message_is_never_more_than_twenty_steps_away():
    """Messages at 0, 1, 2, then every twentieth step, however short: that of 3 is sent at 22."""
    assert agreed(0.001, 0.001) == {1: SAVE, 42: STOP}


def test_a_closed_terminal_is_a_signal_like_any_other_and_nohup_keeps_it_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for usual, heard in [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, None)]:
            signal.signal(signal.SIGHUP, usual)
            request, inner = StopRequest(), StopRequest()
            with request.listen():
                os.kill(os.getpid(), signal.SIGHUP)
                assert request.signal == heard
                with inner.listen():  # as of a stage within stages
                    os.kill(os.getpid(), signal.SIGHUP)
                    assert inner.signal == heard
            assert signal.getsignal(signal.SIGHUP) == usual
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_leaves_a_closed_terminal_to_its_parent():
    """A hangup goes to the whole process group; a worker that died of it would end the run."""
    with worker_processes(1) as executor:
        pid = executor.submit(os.getpid).result()
        os.kill(pid, signal.SIGHUP)
        assert executor.submit(os.getpid).result() == pid


CHATTY = """
import os, sys
from harness.resilience.unfailing_output import unfailing_output
with unfailing_output():
    print("heard", flush=True)
    os.read(0, 1)
    print("lost", flush=True)
    print("lost", file=sys.stderr, flush=True)
    os.write(int(sys.argv[1]), b"survived")
try:
    print("outside", flush=True)
except OSError as error:
    os.write(int(sys.argv[1]), f", {error.strerror}".encode())
os._exit(0)
"""


@pytest.mark.parametrize("kind, why", [("terminal", "Input/output"), ("pipe", "Broken pipe")])
def test_output_that_nobody_reads_any_more_does_not_end_a_run(kind, why):
    theirs, ours = pty.openpty()[::-1] if kind == "terminal" else os.pipe()[::-1]
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", CHATTY, str(writing)],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        pass_fds=[writing],
    )
    os.close(theirs)
    os.close(writing)
    assert b"heard" in os.read(ours, 100)
    os.close(ours)
    process.communicate(b"x", timeout=60)
    assert process.returncode == 0
    with os.fdopen(reading) as told:
        assert told.read().startswith(f"survived, {why}")


def test_output_without_a_file_stays_as_it_is(capsys):
    with unfailing_output():
        print("captured")
    assert capsys.readouterr().out == "captured\n"
