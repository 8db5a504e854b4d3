"""The merged log; what the task does on a cluster is tested there."""

import pickle
from types import SimpleNamespace

import pytest

import launch.task
from harness.errors import record_for_torchrun
from launch.slurm.job_step import Task, read_torchrun_error
from launch.slurm.log import open_log
from launch.slurm.notes import StartNotes


def place(rank):
    names = dict(job_id="7", restarts=1, rank=rank, name=f"n{rank}, rank {rank}")
    return SimpleNamespace(leader=rank == 0, **names)


def write_streams(tmp_path, rank, output, errors):
    """Write a rank's streams, then have the leader include them; return the merged log."""
    path = tmp_path / f"{len([*tmp_path.iterdir()])}.log"
    log = open_log(str(path), place(rank))
    for line in output.splitlines(keepends=True):
        log.output(line)
    for line in errors.splitlines(keepends=True):
        log.errors(line)
    assert path.exists() == (rank == 0)  # the leader alone writes it
    (log if rank == 0 else open_log(str(path), place(0))).close(failed=False)
    return path.read_text(), log.complaint


TROUBLE = """\
a warning
[rank3]: Traceback (most recent call last):
[rank3]:   File "x.py", line 1, in f
[rank3]: RuntimeError: broken
another warning
error: rank 3: the disk is full
E1124 03:26:53.5 api.py:883] failed (exitcode: 1) local_rank: 0
"""


def test_all_of_rank_0(tmp_path):
    text, _ = write_streams(tmp_path, 0, "epoch 1\n", "a warning\n")
    assert text == "epoch 1\na warning\n"


def test_of_other_ranks_what_went_wrong_with_host_and_rank(tmp_path):
    text, _ = write_streams(tmp_path, 3, "epoch 1\n", TROUBLE)
    wanted = [line for line in TROUBLE.splitlines() if "warning" not in line]
    assert text.splitlines() == [f"[n3, rank 3] {line}" for line in wanted]


def test_the_last_complaint_is_kept(tmp_path):
    before_torchrun = TROUBLE.partition("E1124")[0]
    _, complaint = write_streams(tmp_path, 3, "", before_torchrun)
    assert complaint == "rank 3: the disk is full"
    _, complaint = write_streams(tmp_path, 3, "", TROUBLE.partition("another")[0])
    assert complaint == "RuntimeError: broken"


def test_the_cause_of_an_end_is_the_rank_that_failed_not_the_one_that_heard_of_it(tmp_path):
    path, start = tmp_path / "run.log", StartNotes(tmp_path / "run.log", "7", 1)
    leader, other = open_log(str(path), place(0)), open_log(str(path), place(2))
    assert start.cause() == ""
    other.error("ended with exit code 1: the disk is full")
    assert start.cause() == "n2, rank 2: ended with exit code 1: the disk is full"
    leader.error("ended as another rank did")
    leader.close(failed=True)
    assert start.cause() == "n2, rank 2: ended with exit code 1: the disk is full"
    assert StartNotes(path, "7", 0).cause() == StartNotes(path, "8", 1).cause() == ""
    assert path.read_text().splitlines() == [
        "error: n0, rank 0: ended as another rank did",
        "error: n2, rank 2: ended with exit code 1: the disk is full",
    ]


def test_a_note_that_is_half_written_is_left_for_later(tmp_path):
    leader, other = (open_log(str(tmp_path / "run.log"), place(rank)) for rank in (0, 1))
    other.error("first")
    (notes,) = (tmp_path / "run.notes").iterdir()
    whole = notes.read_text()
    notes.write_text(whole + '{"text": "sec')
    leader.close(failed=False)
    notes.write_text(whole + '{"text": "second\\n", "cause": ""}\n')
    leader.close(failed=False)
    assert (tmp_path / "run.log").read_text() == "error: n1, rank 1: first\nsecond\n"


@pytest.mark.parametrize(
    ("launcher", "nodes", "tasks", "right"),
    [
        *(("srun", 2, 4, True), ("srun", 3, 6, True), ("srun", 2, 1, False)),
        *(("srun", 1, 2, False), ("torchrun", 2, 2, True), ("torchrun", 2, 1, False)),
    ],
)
def test_a_task_compares_the_number_of_tasks_with_the_plan(launcher, nodes, tasks, right):
    task = Task((), "/r", "/l", launcher, min_nodes=2, gpus_per_node=2, requeues=3, environment={})
    found = task._check_start(SimpleNamespace(nodes=nodes, tasks=tasks))
    assert (found == "") == right
    assert right or f"started {tasks} tasks on {nodes} nodes" in found


def test_torchruns_error_file_tells_why_a_rank_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert read_torchrun_error(tmp_path / "error.json") == ""
    record_for_torchrun("the disk is full")
    assert read_torchrun_error(tmp_path / "error.json") == "the disk is full"


# pickle.dumps(launch.task.Task(…), protocol=0), when launch/task.py was its home and had no `code`
SUBMITTED_BEFORE_THE_MOVE = (
    b"ccopy_reg\n_reconstructor\np0\n(claunch.task\nTask\np1\nc__builtin__\nobject\n"
    b"p2\nNtp3\nRp4\n(dp5\nVarguments\np6\n(Vc.yaml\np7\nV--out\np8\nV/r\np9\nV--res"
    b"ume\np10\ntp11\nsVrun\np12\ng9\nsVlog\np13\nV/l\np14\nsVlauncher\np15\nVsrun\n"
    b"p16\nsVmin_nodes\np17\nI1\nsVgpus_per_node\np18\nI2\nsVrequeues\np19\nI3\nsVen"
    b"vironment\np20\n(dp21\nVA\np22\nV1\np23\nssb."
)


def test_a_job_that_was_submitted_before_the_task_moved_still_unpickles():
    task = pickle.loads(SUBMITTED_BEFORE_THE_MOVE)
    assert task == Task(
        arguments=("c.yaml", "--out", "/r", "--resume"),
        run="/r",
        log="/l",
        launcher="srun",
        min_nodes=1,
        gpus_per_node=2,
        requeues=3,
        environment={"A": "1"},
        code=None,
    )
    assert launch.task.Task is Task
