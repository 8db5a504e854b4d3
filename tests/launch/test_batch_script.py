"""The batch script, run by bash with an srun and a scontrol that record what they were given."""

import os
import signal
import subprocess
import time

import pytest
import yaml

from harness.config.loading import load_config
from harness.errors import UserError
from launch.backend import Request
from launch.cluster_file import load_cluster
from launch.run_spec import RunSpec
from launch.slurm.submission import make_executor
from launch.slurm.submission_environment import check_sbatch_variables, outside_any_job

SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" > {bin}/srun.arguments
env > {bin}/srun.environment
trap 'echo USR2 >> {bin}/srun.signals; [ -e {bin}/requeues ] && touch "$HARNESS_REQUEUE_FILE"' USR2
echo ready > {bin}/srun.ready
for i in $(seq 100); do [ -e {bin}/srun.signals ] && exit 0; sleep 0.05; done
exit 9
"""


@pytest.fixture
def script(small, tmp_path):
    """Returns the script for a run below a folder with awkward characters."""

    def text(folder="a b#c,d'e", **keys):
        cluster = {"folder": str(tmp_path / folder), "nodes": 2, "gpus_per_node": 2}
        cluster |= {"cpus_per_gpu": 3, "timeout_min": 30} | keys
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        run = tmp_path / folder / "my run"
        spec = RunSpec("my run", run, load_config(small()))
        request = Request(load_cluster(tmp_path / "cluster.yaml"), run, [spec])
        return make_executor(request).script()

    return text


@pytest.fixture
def start(tmp_path):
    """Starts a script with the recording commands; returns its process and their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("scontrol", '#!/bin/bash\necho "$@" >> {bin}/scontrol.calls'),
    ):
        (folder / name).write_text(text.format(bin=folder))
        (folder / name).chmod(0o755)

    def start_script(text, path=f"{tmp_path}/bin:/usr/bin:/bin", **variables):
        (tmp_path / "a b#c,d'e" / "my run.slurm").mkdir(parents=True, exist_ok=True)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "PATH": path}
        process = subprocess.Popen(["bash", "-c", text], env=slurm | variables)
        deadline_s = time.monotonic() + 20
        while not (folder / "srun.ready").exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return process, folder

    return start_script


def test_srun_gets_the_size_of_this_job_and_logs_in_its_folder(script, start, tmp_path):
    process, folder = start(script(), SLURM_NTASKS="1", SLURM_EXPORT_ENV="NONE")
    process.send_signal(signal.SIGUSR2)  # as slurmctld does where signal: is B:USR2@60
    assert process.wait(20) == 0
    given = (folder / "srun.arguments").read_text().splitlines()
    logs = f"{tmp_path}/a b#c,d'e/my run.slurm/7"
    assert f"--output={logs}_%t_log.out" in given and f"--error={logs}_%t_log.err" in given
    for word in ("--nodes=3", "--ntasks=6", "--ntasks-per-node=2", "--mem=0", "--export=ALL"):
        assert word in given
    assert (folder / "srun.signals").read_text() == "USR2\n"  # passed on
    assert not (folder / "scontrol.calls").exists()


def test_the_batch_script_requeues_where_a_task_asks_it_to(script, start):
    process, folder = start(script())
    (folder / "requeues").touch()
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 0
    assert (folder / "scontrol.calls").read_text() == "requeue 7\n"


def test_an_array_task_has_logs_of_its_own(script, start):
    process, folder = start(script(), SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    process.send_signal(signal.SIGUSR1)
    assert "/5_2_%t_log.out" in (folder / "srun.arguments").read_text()
    process.kill()
    process.wait()


def test_options_of_many_sites_in_the_script(script):
    plain = script()
    assert "wckey" not in plain and "#SBATCH --gpus-per-node=2\n" in plain
    assert "#SBATCH --gpus-per-node=h100:2\n" in script(gpus_per_node="h100:2")
    by_gres = script(sbatch={"gres": "gpu:h100:2,nvme:1", "wckey": "vision"})
    assert "gpus-per-node" not in by_gres and "#SBATCH --gres=gpu:h100:2,nvme:1\n" in by_gres
    assert "#SBATCH --wckey=vision\n" in by_gres


def test_a_percent_sign_in_the_folder_is_refused(script):
    with pytest.raises(UserError, match="SLURM reads % in a path as a pattern"):
        script(folder="100%j")


SCRIPT = """\
#SBATCH --partition=low
#SBATCH --time=30
#SBATCH --mem=2048M
#SBATCH --requeue
#SBATCH --gpus-per-node=2
#SBATCH --job-name='a b'
"""


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("SBATCH_PARTITION", "high", "--partition=low"),
        ("SBATCH_TIMELIMIT", "3", "--time=30"),
        ("SBATCH_NO_REQUEUE", "1", "--requeue"),
        ("SBATCH_JOB_NAME", "other", "--job-name='a b'"),
        ("SBATCH_MEM_PER_CPU", "1G", "--mem=2048M"),
        ("SBATCH_MEM_PER_NODE", "1G", "--mem=2048M"),
        ("SBATCH_GRES", "gpu:1", "--gpus-per-node=2"),
        ("SBATCH_WAIT", "1", "wait for the job's end"),
        ("SBATCH_ARRAY_INX", "0-3", "decides what is an array"),
    ],
)
def test_a_variable_that_would_override_the_job_is_refused(name, value, option):
    with pytest.raises(UserError) as refused:
        check_sbatch_variables(SCRIPT, {name: value})
    assert f"unset {name}" in str(refused.value) and option in str(refused.value)


def test_variables_that_contradict_nothing_stay():
    names = {"SBATCH_PARTITION": "low", "SBATCH_TIMELIMIT": "30", "SBATCH_JOB_NAME": "a b"}
    names |= {"SBATCH_REQUEUE": "1", "SBATCH_QOS": "night", "SBATCH_EXPORT": "NONE"}
    check_sbatch_variables(SCRIPT, names | {"SLURM_PARTITION": "high"})


def test_a_job_inherits_nothing_of_the_job_that_it_is_submitted_from(monkeypatch):
    kept = {"SLURM_CONF": "/c", "SBATCH_QOS": "night", "NCCL_DEBUG": "INFO"}
    inside = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "1", "SLURM_MEM_PER_CPU": "5"}
    inside |= {"SLURMD_NODENAME": "n1", "CUDA_VISIBLE_DEVICES": "0"}
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in (kept | inside).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with outside_any_job():
        assert {name: os.environ.get(name) for name in inside} == dict.fromkeys(inside)
        assert {name: os.environ.get(name) for name in kept} == kept
    assert dict(os.environ) == before
    monkeypatch.delenv("SLURM_JOB_ID")
    with outside_any_job():  # on a login node the choice of GPUs is the user's
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
