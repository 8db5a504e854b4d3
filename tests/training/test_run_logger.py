import json
import os

from harness.config.loading import load_config
from harness.execution.evaluation import Evaluation
from harness.runs.logging.jsonl import read_log
from harness.training.metrics import TrainMetrics
from harness.training.run_logger import RunLogger

READING = TrainMetrics(
    loss=0.5,
    error=12.5,
    replaced=0,
    overflows=0,
    overflows_in_row=0,
    first_bad_step=None,
)


def test_plain_lines_when_the_output_is_no_terminal(small, tmp_path, capsys):
    logger = RunLogger(tmp_path, load_config(small()), 0)
    logger.train_line(2, READING, lr=0.1, data_wait_s=0.0)
    logger.evaluation_line(5, Evaluation(correct=351, top5_correct=360, total=360, loss=0.25))
    logger.close()
    train, evaluation = capsys.readouterr().out.splitlines()
    assert train.startswith("epoch 1/3  step 2/15  loss 0.5000  train error 12.50 %  lr 0.1  ")
    assert "images/s  data 0 %  left 0:0" in train
    # 9 of 360 wrong: 2.5 %
    assert evaluation == (
        "epoch 1/3  error 2.50 %  top-5 error 0.00 %  loss 0.2500  (360 of 360 images counted)"
    )


def test_a_run_folder_whose_name_is_not_utf8_has_a_log(small, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"run\xe9")
    folder.mkdir()
    logger = RunLogger(folder, load_config(small()), 0)
    logger.train_line(2, READING, lr=0.1, data_wait_s=0.0)
    logger.close()
    assert "tensorboard': not written: the name is not UTF-8" in capsys.readouterr().out
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [2]


def test_the_log_leaves_out_torn_and_superseded_lines(small, tmp_path):
    config = load_config(small())
    logger = RunLogger(tmp_path, config, 0)
    for step in (5, 10, 12):
        logger.event("checkpoint", step, loss=float(step))
    logger.close()
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"event": "checkpoint", "step": 1')  # a write cut off by a crash
    logger = RunLogger(tmp_path, config, 10)
    logger.event("resume", 10)
    logger.event("checkpoint", 12, loss=-12.0)
    logger.close()
    assert [(line["event"], line["step"]) for line in read_log(log)] == [
        ("checkpoint", 5),
        ("checkpoint", 10),
        ("resume", 10),
        ("checkpoint", 12),
    ]
    assert read_log(log)[-1]["loss"] == -12.0
    assert len(log.read_text().splitlines()) == 6  # nothing was rewritten
    assert json.loads(log.read_text().splitlines()[-1])["loss"] == -12.0


def test_tensorboard_has_the_curves(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunLogger(tmp_path, load_config(small()), 0)
    logger.train_line(2, READING, lr=0.1, data_wait_s=0.0)
    logger.evaluation_line(5, Evaluation(correct=351, top5_correct=360, total=360, loss=0.25))
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/error")] == [(5, 2.5)]


def test_other_ranks_write_nothing(small, tmp_path, capsys):
    logger = RunLogger(None, load_config(small()), 0)
    logger.event("train", 1)
    logger.train_line(2, READING, lr=0.1, data_wait_s=0.0)
    logger.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "log.jsonl").exists()
