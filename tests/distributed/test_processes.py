"""Real processes on this machine: they find each other, and compute what one would."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import process_worker
import pytest
import tiny_runs

from jaxdyn import kernels
from jaxdyn.cli import main
from jaxdyn.distributed import processes
from jaxdyn.distributed.processes import Cluster, NotJoined, find_cluster, take_roll_call
from jaxdyn.grammar import save_config
from jaxdyn.train import task
from jaxdyn.types import JaxdynError

WORKER = process_worker.__file__


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


# -- who one is -----------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[03-04],x",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPI4 = MPI | {"OMPI_MCA_orte_hnp_uri": f"{5 * 2**12}.0;tcp://10.0.0.7,10.0.0.8:34911"}


@pytest.fixture
def environment(monkeypatch):
    def put(**variables):
        for name in ("JAXDYN_DISTRIBUTED", "JAXDYN_JOIN_SECONDS", *SLURM, *MPI4):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("asked", "around", "found"),
    [
        ("", SLURM, None),
        ("head:99,4,3", {}, Cluster("head:99", 4, 3)),
        ("[::1]:99,4,0", {}, Cluster("[::1]:99", 4, 0)),
        ("head:99,1,0", {}, None),
        ("auto", SLURM, Cluster(f"gpu03:{61440 + 77}", 16, 9, [1])),
        ("head:99", SLURM, Cluster("head:99", 16, 9, [1])),
        ("auto", SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ("auto", MPI4, Cluster(f"10.0.0.7:{61440 + 5}", 4, 3, [1])),
        ("head:99", MPI, Cluster("head:99", 4, 3, [1])),  # Open MPI 5 names no address
    ],
)
def test_the_cluster_that_the_environment_names(asked, around, found, environment):
    environment(JAXDYN_DISTRIBUTED=asked, **around)
    assert find_cluster() == found


def test_without_a_cluster_it_runs_alone_and_says_so(environment, capsys):
    environment(JAXDYN_DISTRIBUTED="auto")
    assert processes.start_processes() == 0
    said = capsys.readouterr().err
    assert said == "jaxdyn: JAXDYN_DISTRIBUTED=auto, but no cluster is found: it runs alone\n"


@pytest.mark.parametrize(
    ("asked", "around", "said"),
    [
        ("head", {}, "must be auto, HOST:PORT or HOST:PORT,PROCESSES,INDEX"),
        ("auto,2,1", {}, "must be auto"),
        ("head:99,2", {}, "got 'head:99,2'"),
        ("head:99,2,2", {}, "INDEX below PROCESSES, got 'head:99,2,2'"),
        ("head:99,2,-1", {}, "got 'head:99,2,-1'"),
        ("head:0,2,1", {}, "got 'head:0,2,1'"),
        ("head:99", {}, "no cluster says how many processes there are"),
        ("auto", {"JAXDYN_JOIN_SECONDS": "soon"}, "JAXDYN_JOIN_SECONDS must be a number"),
        ("auto", {"JAXDYN_JOIN_SECONDS": "nan"}, "above 0, got 'nan'"),
    ],
)
def test_an_environment_that_is_wrong(asked, around, said, environment):
    environment(JAXDYN_DISTRIBUTED=asked, **around)
    with pytest.raises(JaxdynError, match=said) as raised:
        processes.start_processes()
    assert raised.value.exit_code == 2


# -- the roll call --------------------------------------------------------------------------------


def roll_calls(*calls: tuple[int, int], seconds: float = 0.5) -> list[str]:
    """What the processes (PROCESSES, INDEX) learn when all are started at once; "" is all well."""
    address = f"localhost:{free_port()}"

    def one(call):
        try:
            take_roll_call(Cluster(address, *call), seconds)
        except NotJoined as error:
            assert error.exit_code == 69
            return str(error).replace(address, "ADDRESS")
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_all_are_there():
    assert roll_calls((3, 2), (3, 0), (3, 1), seconds=30.0) == ["", "", ""]


def test_every_process_learns_who_is_missing():
    said = "processes 1, 3 of 4 did not join process 0 at ADDRESS within 0.5 s"
    assert roll_calls((4, 0), (4, 2)) == [said, said]
    few = "processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 more of 20 did not join process 0 at ADDRESS"
    assert roll_calls((20, 0)) == [f"{few} within 0.5 s"]


def test_process_0_that_is_not_there():
    (said,) = roll_calls((2, 1))
    wanted = "process 1 of 2 found no process 0 at ADDRESS within 0.5 s: Connection refused"
    assert said == wanted


def test_processes_that_were_told_of_another_number():
    said = "process 0 was started as one of 2, and the process 1 as one of 4"
    assert roll_calls((2, 0), (4, 1), seconds=30.0) == [said, said]


def test_an_address_that_is_taken():
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(NotJoined, match=f"cannot listen at {address}: Address already in use"):
            take_roll_call(Cluster(address, 2, 0), 1.0)


def test_strangers_do_not_count():
    """A scanner that says something else, or hangs up; the process that was meant comes after."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(take_roll_call, Cluster(f"localhost:{port}", 2, 0), 30.0)
        for said in (b"GET / HTTP/1.1\r\n", b"", b"jaxdyn one two\n"):
            end = time.monotonic() + 20
            while True:
                try:
                    with socket.create_connection(("localhost", port), timeout=20) as stranger:
                        stranger.sendall(said)
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < end
                    time.sleep(0.01)
        take_roll_call(Cluster(f"localhost:{port}", 2, 1), 30.0)
        first.result()


# -- processes ------------------------------------------------------------------------------------


class Started:
    """The processes of one command, each with `devices` devices; none outlives the block."""

    def __init__(self, root: Path, count: int, devices: int, *arguments: str, **variables: str):
        self.logs = [root / f"log-{time.monotonic_ns()}-{index}" for index in range(count)]
        self.processes = []
        # Of a flag given twice the last counts; the others are conftest's.
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        common = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        address = f"localhost:{free_port()}"
        for index, log in enumerate(self.logs):
            mine = {"JAXDYN_DISTRIBUTED": f"{address},{count},{index}"}
            with open(log, "wb") as file:
                command = [sys.executable, WORKER, *arguments]
                environment = common | mine | variables
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_until(self, condition, seconds: float = 200) -> None:
        """All processes run until then."""
        end = time.monotonic() + seconds
        while not condition():
            ended = [p.poll() for p in self.processes]
            assert time.monotonic() < end and set(ended) == {None}, (ended, *self.said())
            time.sleep(0.02)

    def codes(self, seconds: float = 200) -> list[int]:
        """Wait for all; their exit codes."""
        end = time.monotonic() + seconds
        return [p.wait(max(end - time.monotonic(), 0)) for p in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


def run_to_the_end(*arguments, **options) -> list[str]:
    """What the processes of a command that succeeds have said."""
    with Started(*arguments, **options) as started:
        assert set(started.codes()) == {0}, "\n".join(started.said())
        return started.said()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a configuration: a classifier step, then two of everything."""
    root = tmp_path_factory.mktemp("processes")
    config = tiny_runs.rl_config(
        root,
        "run",
        optim__schedule="classifier_first",
        optim__classifier_steps=1,
        train__steps=2,
        train__num_prompts=4,
        train__num_generations=2,
        train__checkpoint_every=1,
        evaluation__every=0,
        evaluation__num_prompts=3,  # which no mesh here divides
        evaluation__num_generations=2,
        probe__every=3,
    )
    save_config(config, root / "config.json")
    return root


def rl(place: Path, name: str, **mesh: int) -> list[str]:
    """The words of the run's command."""
    sizes = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    return ["rl", "--config", str(place / "config.json"), "--output", str(place / name), *sizes]


def run_here(*command) -> None:
    """The run by this process alone, on one device."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "open_model", process_worker.wide(task.open_model))
        main(rl(*command))


@pytest.fixture(scope="module")
def alone(place):
    run_here(place, "alone")
    return place / "alone"


def assert_same_numbers(run: Path, other: Path) -> None:
    """The same completions, and everything that was measured to 1e-9, in float64."""
    for name in ("samples.jsonl", "completions.jsonl"):
        assert tiny_runs.lines(run, name) == tiny_runs.lines(other, name)
    for name in ("metrics.jsonl", "dynamics.jsonl"):
        got, wanted = tiny_runs.lines(run, name), tiny_runs.lines(other, name)
        assert [line["step"] for line in got] == [line["step"] for line in wanted]
        for mine, theirs in zip(got, wanted, strict=True):
            keys = {k for k in theirs if not k.startswith("time/") and k != "step_time"}
            for key in keys:
                limit = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True, "err_msg": key}
                np.testing.assert_allclose(mine[key], theirs[key], **limit)


# Gloo has its own say, from a thread a device, whose words may come between each other's.
GLOO = re.compile(
    r"\[Gloo\] Rank |is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |[\d\s]"
)


@pytest.mark.slow
def test_processes_do_what_one_does(place, alone):
    """Two, with matrices across them; below, with rows."""
    first, other = run_to_the_end(place, 2, 1, *rl(place, "both", fsdp=1, tensor=2, devices=2))
    assert_same_numbers(place / "both", alone)
    assert f"run: {place / 'both'}" in first and "3/3  reward" in first
    assert GLOO.sub("", other) == ""


@pytest.mark.slow
def test_two_processes_are_preempted_and_one_goes_on(place, alone):
    """Any of them may be told; all save, together, and what they saved is one whole.

    Each holds half of every parameter, on two devices; one then reads it together.
    """
    metrics = place / "two" / "metrics.jsonl"
    with Started(place, 2, 2, *rl(place, "two", fsdp=2, tensor=2, devices=4)) as started:
        started.wait_until(lambda: metrics.exists() and '"step": 0' in metrics.read_text())
        started.processes[1].send_signal(signal.SIGTERM)
        assert started.codes() == [75, 75], started.said()
        assert "preempted; " in started.said()[0]
    assert 0 <= tiny_runs.lines(place / "two", "metrics.jsonl")[-1]["step"] < 2
    run_here(place, "two")
    assert_same_numbers(place / "two", alone)


@pytest.mark.slow
def test_kernels_of_many_processes(tmp_path):
    """Tiles of every process's own, tiles found on disk, tiles of a model that is divided."""
    run_to_the_end(tmp_path, 2, 1, "kernel", str(tmp_path))
    assert len(list((tmp_path / "blocks").glob("tile_*.npz"))) == 3  # of a symmetric 2 x 2
    with jax.enable_x64(True):
        model, params, sites = process_worker.problem()
        wanted = kernels.log_prob_kernel(model, params, sites, method="gram")
    for name in ("apart", "again", "together"):
        for number in range(2):
            got = np.load(tmp_path / f"{name}-{number}.npz", allow_pickle=False)
            assert set(got) == {"representation", "gradient", "cross"}
            for part in got:
                whole = np.asarray(getattr(wanted, part))
                limit = 1e-12 * np.abs(whole).max()
                np.testing.assert_allclose(got[part], whole, rtol=0, atol=limit)


def test_a_process_that_dies_ends_the_others(tmp_path):
    with Started(tmp_path, 2, 1, "meet", str(tmp_path)) as started:
        met = [tmp_path / f"met{index}" for index in range(2)]
        started.wait_until(lambda: all(path.exists() for path in met))
        started.processes[1].kill()
        code, killed = started.codes(60)
    assert killed == -signal.SIGKILL and code not in (0, 2)


def test_the_command_line_says_who_did_not_come(tmp_path):
    """Before anything heavy, and with a code that says that it may go well another time."""
    asked = {"JAXDYN_DISTRIBUTED": f"localhost:{free_port()},2,0", "JAXDYN_JOIN_SECONDS": "0.2"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxdyn.cli", "rl"],
        env=os.environ | asked,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    where = asked["JAXDYN_DISTRIBUTED"].split(",")[0]
    said = f"jaxdyn: process 1 of 2 did not join process 0 at {where} within 0.2 s\n"
    assert (done.returncode, done.stderr) == (69, said)
    assert list(tmp_path.iterdir()) == []
