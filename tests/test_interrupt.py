import ast
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
import sys
from harness.distributed import process_group, world_from_environment
from harness.interrupt import Agreement
world = world_from_environment("cpu")
step_s = [float(word) for word in sys.argv[1:]][world.rank]
with process_group(world, 60) as control:
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
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
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
