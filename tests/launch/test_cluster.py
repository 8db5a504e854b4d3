import pytest

from harness.config.errors import ConfigError
from harness.errors import UserError
from launch.cluster_file import check_environment, load_cluster

GOOD = """\
folder: /shared/runs
nodes: 4
gpus_per_node: 8
cpus_per_gpu: 12
mem_gb: 900
timeout_min: 240
environment: {NCCL_SOCKET_IFNAME: ib0, NCCL_DEBUG_LEVEL: 2}
sbatch: {qos: low, exclusive: true, signal: USR2@300}
run: {data_root: /shared/imagenet}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, *changes):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def test_the_example_is_the_papers_256_ranks():
    cluster = load_cluster("configs/clusters/example.yaml")
    assert (cluster.ranks, cluster.requeues, cluster.launcher) == (256, 20, "srun")
    assert cluster.run.model_fields_set == {"data_root", "loader_threads"}


def test_nodes_are_a_number_or_a_range(write):
    path = write(GOOD)
    assert (load_cluster(path).min_nodes, load_cluster(path).max_nodes) == (4, 4)
    ranged = load_cluster(path, nodes="2-4")
    assert (ranged.min_nodes, ranged.max_nodes, ranged.ranks) == (2, 4, 32)
    assert load_cluster(path).environment["NCCL_DEBUG_LEVEL"] == "2"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (("nodes: 4", "node: 4"), ["node: unknown key, did you mean nodes?"]),
        (("folder: /shared/runs\n", ""), ["folder: missing"]),
        (("nodes: 4", "nodes: 4-2"), ["nodes: expected a number, or a range", "'4-2'"]),
        (("nodes: 4", "nodes: 0"), ["nodes: expected a number, or a range"]),
        (("nodes: 4", "nodes: true"), ["nodes: expected text, found true"]),
        (("timeout_min: 240", "timeout_min: 4:00:00"), ["timeout_min: expected a whole number"]),
        (("timeout_min: 240", "timeout_min: 240\nlauncher: mpi"), ["launcher: expected", "srun"]),
        (("timeout_min: 240", "timeout_min: 240\nrequeues: -1"), ["requeues: expected at least 0"]),
        (("NCCL_DEBUG_LEVEL: 2", "DEBUG: off"), ["environment.DEBUG: expected text, found false"]),
        (("qos: low", "gpus_per_node: 4"), ["sbatch.gpus_per_node: set by gpus_per_node"]),
        (("qos: low", "time: 60"), ["sbatch.time: set by timeout_min; write it there"]),
        (("qos: low", "gpus: 8"), ["sbatch.gpus: set by gpus_per_node"]),
        (("qos: low", "gres: gpu:h100:4"), ["sbatch.gres: asks for 4 GPUs, but gpus_per_node is"]),
        (
            ("qos: low", "mem-per-gpu: 9G, x: y"),
            ["sbatch.mem-per-gpu: mem_gb asks for memory, too"],
        ),
        (
            ("signal: USR2@300", "signal: INT@300"),
            ["sbatch.signal: the ranks stop at USR1 or USR2"],
        ),
        (("qos: low", "output: x.log"), ["sbatch.output: set by the launcher; remove it"]),
        (("qos: low", "qos: [low]"), ["sbatch.qos: expected text, a number or true"]),
        (("data_root", "data_rot"), ["run.data_rot: unknown key, did you mean run.data_root?"]),
        (("run: {", "run: {device: tpu, "), ["run.device: expected", "cuda"]),
    ],
)
def test_each_mistake_is_one_line_that_names_file_and_key(write, change, parts):
    path = write(GOOD, change)
    with pytest.raises(ConfigError) as refused:
        load_cluster(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1
    assert all(part in message for part in parts), message


def test_gpus_by_type_and_by_gres(write):
    typed = load_cluster(write(GOOD, ("gpus_per_node: 8", "gpus_per_node: h100:8")))
    assert (typed.gpus_per_node, typed.gpu_type, typed.ranks) == (8, "h100", 32)
    for gres, count in [("gpu:8", 8), ("gpu:h100:8,nvme:1", 8), ("nvme:1", None)]:
        assert load_cluster(write(GOOD, ("qos: low", f'gres: "{gres}"'))).gpus_by_gres == count
    typed_twice = ("gpus_per_node: 8", "gpus_per_node: h100:8"), ("qos: low", "gres: gpu:8")
    with pytest.raises(ConfigError, match="gpus_per_node names a type of GPU, too"):
        load_cluster(write(GOOD, *typed_twice))


@pytest.mark.parametrize("signal", ["USR2@300", "B:USR2@60", "SIGUSR1", "RB:10@9"])
def test_signals_that_the_ranks_stop_at(write, signal):
    load_cluster(write(GOOD, ("USR2@300", f'"{signal}"')))


@pytest.mark.parametrize("text", ["", "- a list", "folder: [", "folder: a\nfolder: b"])
def test_no_cluster_file_at_all(write, text, tmp_path):
    with pytest.raises(ConfigError, match=r"cluster\.yaml"):
        load_cluster(write(text))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path / "missing.yaml")


def test_what_jobs_would_inherit_must_not_fight_the_file(write):
    path = write(GOOD)
    cluster = load_cluster(path)
    check_environment(cluster, path, {"NCCL_SOCKET_IFNAME": "ib0", "HOME": "/root"})
    with pytest.raises(UserError, match=r"NCCL_SOCKET_IFNAME: ib0, but here it is eth0.*unset"):
        check_environment(cluster, path, {"NCCL_SOCKET_IFNAME": "eth0"})
    # with one MASTER_PORT for all jobs their ranks would meet
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UserError, match=rf"{name} is set here.*unset {name}"):
            check_environment(cluster, path, {name: "8"})


@pytest.mark.parametrize(("file", "shell"), [("soon", {}), ("20", {"HARNESS_GRACE_S": "0"})])
def test_a_grace_time_that_is_none_is_refused_before_anything_is_submitted(write, file, shell):
    changed = "NCCL_DEBUG_LEVEL: 2", f"HARNESS_GRACE_S: {file}"
    cluster = load_cluster(write(GOOD, changed))
    with pytest.raises(UserError, match=r"HARNESS_GRACE_S=(soon|0): give seconds, such as 20"):
        check_environment(cluster, "c.yaml", shell)
