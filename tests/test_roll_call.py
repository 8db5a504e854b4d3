"""Ranks that do not belong together end before the first step, all with one and the same line."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

import harness.roll_call
from harness import load_config
from harness.data.sources.folder import open_folder
from harness.errors import UserError
from harness.outcome import RunFailed, Stopped
from harness.rank_card import OWN_KEYS, Card, shared_settings
from harness.rendezvous import patience
from harness.roll_call import attend, publish_verdict
from tests.conftest import free_port, rank_environment

CARD = Card(0, "node3", "p0", {"recipe.momentum": 0.9}, "c0", {"torch": "2.14"}, ("out", "", "out"))


def call(*cards: Card, look_up=lambda rank, topic, name: {}, timeout_s=20.0, absent=()):
    """What each rank of a roll call ends with: None, or an exception."""
    store, ends = dist.HashStore(), [None] * len(cards)

    def attending(rank: int) -> None:
        try:
            own = lambda topic, name: look_up(rank, topic, name)  # noqa: E731
            attend(store, cards[rank], len(cards), own, patience(timeout_s))
        except Exception as error:
            ends[rank] = error

    threads = [
        threading.Thread(target=attending, args=[rank])
        for rank in range(len(cards))
        if rank not in absent
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ends


def other(rank: int, **changes: object) -> Card:
    return replace(CARD, rank=rank, host="node7", process=f"p{rank}", **changes)


def refusal(ends) -> str:
    """All ranks end with one and the same line."""
    assert {type(end) for end in ends} == {UserError}
    (line,) = {str(end) for end in ends}
    assert "\n" not in line
    return line


def test_equal_cards_begin_the_run():
    assert call(CARD, other(1), other(2)) == [None] * 3


def test_the_first_differing_key_is_named_with_rank_host_and_both_values():
    ends = call(CARD, other(1), other(2, settings={"recipe.momentum": 0.5}))
    assert refusal(ends) == (
        "rank 2 on node7: recipe.momentum is 0.5, rank 0 on node3 has 0.9; start all ranks with "
        "one config"
    )
    ends = call(CARD, other(1, settings=CARD.settings | {"recipe.nesterov": True}))
    assert "recipe.nesterov is true, rank 0 on node3 has null" in refusal(ends)


def test_versions_and_run_folders_and_world_sizes():
    ends = call(CARD, other(1, versions={"torch": "2.13"}))
    assert "rank 1 on node7: torch is 2.13, rank 0 on node3 has 2.14" in refusal(ends)
    ends = call(CARD, other(1, out=("runB", "", "runB")))
    assert "its run folder is runB, that of rank 0 on node3 is out" in refusal(ends)


def test_one_machine_has_one_path_to_a_run_folder_and_two_machines_may_have_two():
    here = replace(CARD, out=("run", "boot-1", "/a/run"))
    assert "its run folder is /b/run" in refusal(
        call(here, other(1, out=("run", "boot-1", "/b/run")))
    )
    assert call(here, other(1, out=("run", "boot-2", "/b/run"))) == [None, None]


def test_the_first_differing_file_of_the_code_is_named():
    files = [
        {"harness/commands/command_line.py": "1", "harness/training/step.py": rank} for rank in "ab"
    ]
    ends = call(CARD, other(1, code="c1"), look_up=lambda rank, topic, name: files[rank])
    assert "rank 1 on node7: harness/training/step.py is different than on rank 0" in refusal(ends)


def rename_a_class(folder: Path) -> None:
    (folder / "3").rename(folder / "three")


def rename_a_file(folder: Path) -> None:
    sorted((folder / "3").iterdir())[1].rename(folder / "3" / "a.png")


def add_a_file(folder: Path) -> None:
    shutil.copy(next((folder / "4").iterdir()), folder / "3" / "a.png")


DIFFERS = "the images of class 3 differ between rank 1 on node7 and rank 0 on node3: "


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (rename_a_class, "class three only in rank 1 on node7, class 3 only in rank 0 on node3"),
        (rename_a_file, f"{DIFFERS}0083.png is only in rank 0 on node3"),
        (add_a_file, f"{DIFFERS}a.png is only in rank 1 on node7"),
    ],
)
def test_the_first_differing_class_and_file_of_the_data_are_named(digits, tmp_path, damage, named):
    """Wherever the folders lie."""
    shutil.copytree(digits / "val", tmp_path / "val")
    indices = [open_folder(digits, "val"), open_folder(tmp_path, "val")]

    def ends():
        ours, theirs = ({"val": index.digest} for index in indices)
        return call(replace(CARD, data=ours), other(1, data=theirs), look_up=look_up)

    def look_up(rank, topic, name):
        index = indices[rank]
        return index.sizes_of(name) if name else index.class_digests()

    assert ends() == [None, None]
    damage(tmp_path / "val")
    indices[1] = open_folder(tmp_path, "val")
    assert f"rank 1 on node7: data: val: {named}" in refusal(ends())


def test_an_answer_too_long_for_the_store_leaves_the_file_unnamed(monkeypatch):
    monkeypatch.setattr(harness.roll_call, "LONGEST_ANSWER", 20)
    cards = [replace(CARD, data={"train": "d0"}), other(1, data={"train": "d1"})]
    line = refusal(call(*cards, look_up=lambda *question: {"a": "x" * 20}))
    assert "data: train: other images than on rank 0 on node3" in line


def test_a_rank_that_never_comes_is_named_after_the_time_out(monkeypatch):
    monkeypatch.setattr(harness.roll_call, "LAST_WORDS_S", 0.2)
    ends = call(CARD, other(1), other(2), timeout_s=0.3, absent=[2])
    assert [type(end) for end in ends] == [RunFailed, RunFailed, type(None)]
    assert "for 0.3 s (run.hang_timeout_s)" in str(ends[0])
    late = call(CARD, other(1), other(2), timeout_s=0.3, absent=[1, 2])
    assert str(late[0]).endswith("missing: rank 1, 2")


def test_a_place_that_is_taken_is_refused_and_the_others_do_not_notice():
    store = dist.HashStore()
    ends = {}

    def attending(name: str, card: Card) -> None:
        try:
            attend(store, card, 2, lambda *question: {}, patience(20))
            ends[name] = None
        except Exception as error:
            ends[name] = error

    first = threading.Thread(target=attending, args=["first", other(1)])
    first.start()
    while not store.check(["card-1"]):
        time.sleep(0.01)
    attending("second", replace(other(1), process="another"))
    assert isinstance(ends["second"], UserError)
    assert "the place of rank 1 is taken, by a process on node7" in str(ends["second"])
    attending("zero", CARD)
    first.join(20)
    assert (ends["first"], ends["zero"]) == (None, None)
    attending("late", replace(other(1), process="another"))  # also once the run has begun
    assert isinstance(ends["late"], UserError)


@pytest.mark.parametrize(
    ("kind", "error"), [("mistake", UserError), ("failure", RunFailed), ("stop", Stopped)]
)
def test_what_one_rank_found_before_it_came_ends_all(kind, error):
    store = dist.HashStore()
    publish_verdict(store, kind, "rank 1 on node7: data/train: missing")
    publish_verdict(store)  # too late: the first verdict counts
    with pytest.raises(error, match="rank 1 on node7: data/train: missing"):
        attend(store, other(2), 4, lambda *question: {}, patience(20))


def test_the_settings_of_a_card_are_all_keys_but_expect_and_a_ranks_own(small):
    config = load_config(small())
    keys = set(shared_settings(config))
    assert {"seed", "data.crop", "recipe.momentum", "distill", "run.precision"} <= keys
    assert not any(key.startswith("expect") for key in keys)
    shared = {key.removeprefix("run.") for key in keys if key.startswith("run.")}
    assert shared | OWN_KEYS == set(type(config.run).model_fields) and not shared & OWN_KEYS


def start_rank(arguments: list[object], environment: dict[str, str], folder: Path | None = None):
    """A real rank, whose output and errors come in one stream; run in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "train", *map(str, arguments)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
    out, _ = process.communicate()
    return process.returncode, out.splitlines()


def test_ranks_that_run_other_code_both_end_with_code_2(small, tmp_path):
    """Rank 1 runs a copy of the package that has one line more."""
    package, copy = Path(harness.roll_call.__file__).parent, tmp_path / "copy"
    shutil.copytree(package, copy / "harness", ignore=shutil.ignore_patterns("*.pyc"))
    with (copy / "harness" / "execution" / "evaluation.py").open("a") as file:
        file.write("#\n")
    arguments, port = [small(), "--out", tmp_path / "run"], free_port()
    folders = [package.parent, copy]  # Python finds the package in the current folder first
    ranks = [start_rank(arguments, rank_environment(r, 2, port), folders[r]) for r in (0, 1)]
    (code, (line,)), (other_code, (other_line,)) = map(ended, ranks)
    assert (code, other_code) == (2, 2)
    assert (
        line.startswith("error: rank 1 on ")
        and "harness/execution/evaluation.py is different" in line
    )
    assert other_line.endswith(line.removeprefix("error: "))
    assert not (tmp_path / "run").exists()


def test_a_rank_of_another_step_is_refused_and_the_run_continues(small, tmp_path):
    """Both steps have one MASTER_PORT in their environment."""
    port = free_port()
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TORCHELASTIC"))}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_JOB_ID": "5"}
    base |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}

    def task(step: int, rank: int, out: str) -> subprocess.Popen:
        own = {"SLURM_STEP_ID": str(step), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        return start_rank([small(), "--out", tmp_path / out], base | own)

    zero, foreign = task(0, 0, "run"), task(1, 1, "other")
    code, lines = ended(foreign)
    assert code == 2 and len(lines) == 1, lines
    assert "is that of SLURM job step 5.0" in lines[0] and "is of SLURM job step 5.1" in lines[0]
    assert zero.poll() is None
    one = task(0, 1, "run")
    assert [ended(zero)[0], ended(one)[0]] == [0, 0]
    assert (tmp_path / "run" / "status.json").exists() and not (tmp_path / "other").exists()


def test_a_mistake_that_only_rank_0_finds_ends_all_ranks_under_torchrun_within_10_s(
    small, tmp_path
):
    """Ranks 1 and 2 would otherwise wait for rank 0 until torchrun kills them, 30 s later."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    launch += ["--master-port", str(free_port()), "-m", "harness", "train", str(small())]
    agent = subprocess.Popen(
        [*launch, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in rank_environment(0, 1, 0).items() if "RANK" not in k},
    )
    seen, found_s = "", 0.0
    for line in agent.stdout:
        seen += line
        if line.startswith("error: ") and not found_s:
            found_s = time.monotonic()
    agent.wait(60)
    assert time.monotonic() - found_s < 10, seen
    assert agent.returncode == 1 and "exitcode  : 2" in seen
    first, *more = [line for line in seen.splitlines() if line.startswith("error: ")]
    mistake = f"{tmp_path}/run: exists and is no run folder; choose another --out"
    assert first == f"error: {mistake}"
    # torchrun mostly ends the others before they speak; on a busy machine they say the same
    assert len(more) <= 2 and all(line.endswith(mistake) for line in more)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
