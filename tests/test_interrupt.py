import os
import signal

from harness.interrupt import Agreement, StopRequest
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
from harness.distributed import process_group, world_from_environment
from harness.interrupt import Agreement
world = world_from_environment("cpu")
with process_group(world, 60) as control:
    agreement = Agreement(control)
    answers = []
    for step in range(5):
        wishes = world.rank == 1 and step == 2, world.rank == 0 and step <= 1
        answers.append(agreement.after_step(*wishes))
    agreement.close()
    print(answers)
"""


def test_one_ranks_wish_is_every_ranks_answer_one_step_later():
    """A wish that stands until its answer comes is answered once."""
    processes = start_ranks(2, ["-c", AGREE])
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    no, save, stop = (False, False), (False, True), (True, False)
    assert outputs == [str([no, save, no, stop, no])] * 2
