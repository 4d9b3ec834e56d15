"""The worker script on this machine: two workers as two process trees, mostly with a stub."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import tiny_runs

from jaxdyn.grammar import save_config
from jaxdyn.models import load_pretrained

SCRIPTS = Path(__file__).parents[2] / "tpu"
WORDS = ("rl", "--preset", "anagrams", "--model.path", "it's $HOME; two words", "--steps=[1, 2]")
BUSY = "open(/dev/vfio/0): Device or resource busy: Couldn't open iommu group /dev/vfio/0"


class Worker:
    """One worker's disk, on which a job that tpu/tpu wrote is started."""

    def __init__(self, box, number: int = 0):
        self.box = box
        self.root = box.root / f"worker{number}"
        self.environment = {
            "JAXDYN_ROOT": str(self.root),
            "JAXDYN_WORKER": str(number),
            "JAXDYN_RETRY_SECONDS": "0",
            "JAXDYN_WATCH_SECONDS": "0.1",
            "WORK": str(box.root / "work"),
            "NUMBER": str(number),
        }
        (box.root / "work").mkdir(exist_ok=True)
        self.root.mkdir()
        (self.root / "installed").write_text("jaxdyn[tpu]\n")

    def stub(self, text: str) -> "Worker":
        """What stands for jaxdyn."""
        self.box.python("jaxdyn", text, self.root / "venv/bin")
        return self

    def job(self, *arguments: str, job: Path | None = None, **changes: str):
        script = job or self.box.job
        return self.box.script(script, *arguments, **self.environment | changes)

    @property
    def status(self) -> str:
        path = self.root / "status"
        return path.read_text() if path.exists() else ""

    @property
    def logs(self) -> list[str]:
        return [path.read_text() for path in sorted((self.root / "logs").glob("worker-*.log"))]

    def ends(self, wait_for, *states: str, seconds: float = 30) -> str:
        """Wait for one of the states, and for the process to be gone; the status."""

        def there():
            return any(f": {state}" in self.status for state in states) and not self.runs()

        wait_for(there, f"{states}: {self.status} {self.logs}", seconds)
        return self.status

    def runs(self) -> bool:
        done = subprocess.run(["flock", "--nonblock", str(self.root / "lock"), "true"])
        return done.returncode != 0


@pytest.fixture
def write_job(box):
    """The job that `tpu/tpu create` gives to the cloud."""

    def write(*words: str, **changes: str) -> Path:
        (box.fake / "slice").unlink(missing_ok=True)
        done = box.tpu("create", *words, **changes)
        assert done.returncode == 0, done.stderr
        box.job = box.root / f"startup-script-{time.monotonic_ns()}"
        box.job.write_bytes(
            (box.local / "first" / ("job.sh" if words else "setup.sh")).read_bytes()
        )
        (box.fake / "calls").unlink()
        return box.job

    return write


@pytest.fixture
def worker(box, write_job):
    write_job(*WORDS, TPU_RETRIES="2", TPU_STALL_SECONDS="0")
    worker = Worker(box)
    yield worker
    if worker.runs():
        os.kill(int((worker.root / "pid").read_text()), signal.SIGKILL)


# -- two workers ----------------------------------------------------------------------------------

MEET = """
import json, os, pathlib, sys, time
work = pathlib.Path(os.environ["WORK"])
number = int(os.environ["NUMBER"])
print("worker", number, "waits", flush=True)
(work / f"here{number}").touch()
while not (work / f"here{1 - number}").exists():
    time.sleep(0.01)
stale = [name for name in os.environ if name.startswith("MEGASCALE_")]
said = {"words": sys.argv[1:], "distributed": os.environ["JAXDYN_DISTRIBUTED"], "stale": stale}
(work / f"said{number}").write_text(json.dumps(said | {"cwd": os.getcwd()}))
print("worker", number, "met the other", flush=True)
"""


def test_both_workers_run_the_same_command_at_once_each_with_its_log(box, write_job, wait_for):
    write_job(*WORDS)
    workers = [Worker(box, number).stub(MEET) for number in range(2)]
    stale = {"MEGASCALE_COORDINATOR_ADDRESS": "gone:8081", "MEGASCALE_NUM_SLICES": "2"}
    for worker in workers:  # the first waits for the second: `boot` must not wait for the command
        assert worker.job(**stale).returncode == 0
    for number, worker in enumerate(workers):
        status = worker.ends(wait_for, "done")
        assert status.startswith(f"worker {number}: done, log {worker.root}/logs/worker-{number}-")
        said = json.loads((box.root / f"work/said{number}").read_text())
        assert said["words"] == [*WORDS, "--output", "gs://my-bucket/first/run"]
        assert said["distributed"] == "auto" and said["stale"] == []
        assert said["cwd"] == str(worker.root / "work")
        lines = [f"worker {number} waits\n", f"worker {number} met the other\n"]
        assert worker.logs == ["".join(lines)]
        (log,) = (worker.root / "logs").glob("worker-*.log")
        assert ["storage", "cp", "--quiet", str(log), "gs://my-bucket/first/logs/"] in box.calls()


@pytest.mark.slow
def test_both_workers_train_one_model(box, write_job, wait_for):
    """The command itself: the processes of the two workers find each other and are one run."""
    config = tiny_runs.sft_config(box.root, "run", train__steps=1)
    save_config(config, box.root / "config.json")
    write_job("sft", "--config", str(box.root / "config.json"), "--output", config.output)
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [Worker(box, number) for number in range(2)]
    for number, worker in enumerate(workers):
        worker.stub("from jaxdyn.cli import main\nmain()\n").job(
            JAXDYN_DISTRIBUTED=f"{address},2,{number}",
            JAX_PLATFORMS="cpu",
            JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        )
    try:
        for worker in workers:
            assert ": done, log " in worker.ends(wait_for, "done", "failed", seconds=200)
    finally:
        for worker in workers:
            worker.job("stop")
    run = Path(config.output)
    (line,) = tiny_runs.lines(run, "metrics.jsonl")
    assert line["step"] == 0
    assert f"model: {run / 'model'}\n" in workers[0].logs[0]
    assert "1/1  loss" in workers[0].logs[0] and str(run) not in workers[1].logs[0]
    model, _ = load_pretrained(run / "model")
    assert model.config.width == 16


# -- a command that fails -------------------------------------------------------------------------

COUNT = """
import os, pathlib, sys, time
tries = pathlib.Path(os.environ["WORK"]) / "tries"
tries.write_text(str(int(tries.read_text() if tries.exists() else 0) + 1))
count = int(tries.read_text())
print("try", count, flush=True)
"""


def tries(worker):
    return int((worker.box.root / "work/tries").read_text())


def test_a_command_that_dies_is_started_again(worker, wait_for):
    worker.stub(COUNT + "sys.exit(0 if count == 3 else 1)")
    worker.job()
    worker.ends(wait_for, "done")
    assert worker.logs == ["try 1\n", "try 2\n", "try 3\n"]
    assert (worker.root / "logs/current.log").read_text() == "try 3\n"


def test_failures_end_and_the_status_points_to_the_log(worker, wait_for):
    worker.stub(COUNT + "os.abort()")
    worker.job()
    status = worker.ends(wait_for, "failed")
    assert tries(worker) == 3  # two restarts were allowed
    assert "failed with exit code 134, log " in status
    log = Path(status.split("log ", 1)[1].split(": ")[0])
    assert log.read_text().startswith("try 3\nFatal Python error: Aborted")  # with a traceback


def test_bad_input_is_not_tried_again(worker, wait_for):
    worker.stub(COUNT + "print('jaxdyn: no such preset', file=sys.stderr); sys.exit(2)")
    worker.job()
    status = worker.ends(wait_for, "failed")
    assert tries(worker) == 1
    assert status.endswith("failed with exit code 2, log " + status.split("log ")[1])
    assert status.endswith(": jaxdyn: no such preset\n") and status.count("\n") == 1


def test_a_held_chip_is_told_apart(worker, wait_for):
    worker.stub(COUNT + f"print({BUSY!r}); sys.exit(1)")
    worker.job()
    assert "worker 0: busy, log " in worker.ends(wait_for, "busy", "failed")
    assert tries(worker) == 3


# -- an abort that looks like a hang --------------------------------------------------------------

HANG = COUNT + "def waits_for_the_others():\n    time.sleep(60)\nwaits_for_the_others()\n"


def test_silence_of_worker_0_ends_the_command_with_a_traceback(box, write_job, wait_for):
    write_job("rl", TPU_RETRIES="1", TPU_STALL_SECONDS="1")
    worker = Worker(box).stub(HANG)
    worker.job()
    status = worker.ends(wait_for, "failed")
    assert tries(worker) == 2
    assert status.endswith(": silent for 1 s; tracebacks in the log\n")
    assert all("in waits_for_the_others" in log for log in worker.logs)


def test_other_workers_may_be_silent(box, write_job, wait_for):
    """They print nothing: process 0 tells how the run goes."""
    write_job("rl", TPU_RETRIES="0", TPU_STALL_SECONDS="1")
    worker = Worker(box, 1).stub(COUNT + "time.sleep(2.5)")
    worker.job()
    worker.ends(wait_for, "done", "failed")
    assert ": done" in worker.status and tries(worker) == 1


# -- stop, start, boot ----------------------------------------------------------------------------

SAVE = (
    COUNT
    + """
import signal
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
if count == 1:
    time.sleep(60)
"""
)


def test_stop_lets_the_command_save_and_the_same_command_goes_on(worker, wait_for):
    worker.stub(SAVE)
    worker.job("start")
    wait_for(lambda: worker.logs == ["try 1\nready\n"], "started")
    stopped = worker.job("stop")
    assert stopped.returncode == 0 and stopped.stdout.startswith("worker 0: stopped, log ")
    assert worker.logs == ["try 1\nready\nsaved\n"]
    assert worker.job("stop").stdout == "worker 0: nothing runs\n"
    worker.job("start")
    worker.ends(wait_for, "done")
    assert worker.logs[1] == "try 2\nready\n"


def test_start_twice_starts_once_and_another_job_is_refused(worker, write_job, wait_for):
    worker.stub(SAVE)
    first = worker.box.job
    worker.job("start", job=first)
    wait_for(lambda: worker.logs == ["try 1\nready\n"], "started")
    again = worker.job("start", job=first)
    assert (again.returncode, again.stdout) == (0, "worker 0: already running\n")
    other = worker.job("start", job=write_job("sft"))
    assert other.returncode == 1
    assert other.stdout == "worker 0: runs another command; tpu/tpu stop ends it\n"
    assert tries(worker) == 1
    worker.job("stop")


def test_a_boot_resumes_the_last_job_unless_it_is_done(worker, write_job, wait_for):
    """The machine restarts with its disk: not the startup script's job, the one given last."""
    worker.stub(COUNT + "print(sys.argv[1])")
    created_with = worker.box.job
    worker.job("start", job=write_job("sft"))
    worker.ends(wait_for, "done")
    assert worker.job(job=created_with).returncode == 0
    time.sleep(0.2)
    assert tries(worker) == 1 and not worker.runs()
    (worker.root / "status").write_text("worker 0: waiting, log x: done\n")  # the power went
    worker.job(job=created_with)
    worker.ends(wait_for, "done")
    assert worker.logs[1] == "try 2\nsft\n"


def test_a_boot_without_a_command_sets_up_only(box, write_job):
    write_job()
    worker = Worker(box).stub(COUNT)
    assert worker.job().returncode == 0
    assert worker.status == "worker 0: ready\n"
    assert not (worker.root / "job.sh").exists() and worker.logs == []


def test_logs_carry_the_workers_number(worker, wait_for):
    worker.stub(COUNT)
    worker.job()
    worker.ends(wait_for, "done")
    command = ["bash", str(worker.root / "job.sh"), "logs"]
    environment = worker.box.environment | worker.environment
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        line = process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
    assert line == "[worker 0] try 1\n"


# -- set-up ---------------------------------------------------------------------------------------

INSTALLERS = """
import json, os, pathlib, sys
work = pathlib.Path(os.environ["WORK"])
with open(work / "installs", "a") as file:
    print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
if (work / "offline").exists():
    sys.exit("no network")
if "pip" in sys.argv and "--target" in sys.argv:
    uv = pathlib.Path(sys.argv[sys.argv.index("--target") + 1]) / "bin" / "uv"
    uv.parent.mkdir(parents=True, exist_ok=True)
    uv.write_text(pathlib.Path(__file__).read_text())
    uv.chmod(0o755)
"""


def installs(box):
    lines = (box.root / "work/installs").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("package", ["jaxdyn[tpu]==9", "gs://my-bucket/first/job/jaxdyn-1.tar.gz"])
def test_set_up_installs_once(package, box, write_job):
    write_job(TPU_PACKAGE=package)
    box.python("python3", INSTALLERS)
    worker = Worker(box)
    root = str(worker.root)
    assert worker.job("setup").returncode == 0
    wanted = package
    if package.startswith("gs://"):
        assert ["storage", "cp", "--quiet", package, f"{root}/"] in box.calls()
        wanted = f"jaxdyn[tpu] @ file://{root}/jaxdyn-1.tar.gz"
    assert installs(box) == [
        ["python3", "-m", "pip", "install", "--quiet", "--upgrade", "--target", f"{root}/uv", "uv"],
        ["uv", "venv", "--clear", "--python", "3.12", f"{root}/venv"],
        ["uv", "pip", "install", "--python", f"{root}/venv/bin/python", wanted],
    ]
    assert worker.job("setup").returncode == 0
    assert len(installs(box)) == 3


def test_a_set_up_that_fails_is_tried_thrice_and_reported(box, write_job, wait_for):
    write_job("rl", TPU_PACKAGE="jaxdyn[tpu]==9")
    box.python("python3", INSTALLERS)
    (box.root / "work").mkdir()
    (box.root / "work/offline").touch()
    worker = Worker(box).stub(COUNT)
    worker.job()
    status = worker.ends(wait_for, "failed")
    assert status == f"worker 0: failed to set up, log {worker.root}/logs/job.log\n"
    assert len(installs(box)) == 3
    assert "no network" in (worker.root / "logs/job.log").read_text()


def test_files_are_brought_beside_the_command(box, write_job, wait_for):
    files = box.root / "files"
    files.mkdir()
    write_job("rl", TPU_FILES=str(files))
    worker = Worker(box).stub(COUNT)
    worker.job()
    worker.ends(wait_for, "done")
    source, target = "gs://my-bucket/first/job/files", str(worker.root / "work")
    assert ["storage", "rsync", "--quiet", "--recursive", source, target] in box.calls()


# -- SLURM ----------------------------------------------------------------------------------------

SRUN = """
import json, os, subprocess, sys
options = [word for word in sys.argv[1:4] if word.startswith("--")]
command = sys.argv[1 + len(options):]
with open(os.environ["WORK"] + "/srun", "w") as file:
    json.dump([options, command], file)
tasks = [
    subprocess.Popen(command, env={**os.environ, "NUMBER": str(i), "SLURM_PROCID": str(i)})
    for i in range(2)
]
with open(os.environ["WORK"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCANCEL = """
import os, signal, sys
for task in open(os.environ["WORK"] + "/tasks").read().split():
    os.kill(int(task), signal.SIGTERM)
print("scancel", *sys.argv[1:], file=open(os.environ["WORK"] + "/said", "a"))
"""
SCONTROL = """
import os, sys
print("scontrol", *sys.argv[1:], file=open(os.environ["WORK"] + "/said", "a"))
"""


@pytest.fixture
def cluster(box):
    (box.root / "work").mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        box.python(name, text)
    box.environment |= {"WORK": str(box.root / "work"), "SLURM_JOB_ID": "7"}
    return box


def test_slurm_runs_the_same_command_in_every_task(cluster):
    cluster.python("jaxdyn", MEET)
    done = cluster.script(SCRIPTS / "slurm.sh", *WORDS)
    assert done.returncode == 0, done.stderr
    options, command = json.loads((cluster.root / "work/srun").read_text())
    log = "--output=jaxdyn-7-%t.log"
    assert options == ["--kill-on-bad-exit=1", log, "--open-mode=append"]
    assert command == ["jaxdyn", *WORDS]
    for number in range(2):
        said = json.loads((cluster.root / f"work/said{number}").read_text())
        assert said["words"] == list(WORDS) and said["distributed"] == "auto"


def test_slurm_passes_the_exit_code_on(cluster):
    cluster.python("jaxdyn", "import sys; sys.exit(2)")
    assert cluster.script(SCRIPTS / "slurm.sh", "rl").returncode == 2
    assert not (cluster.root / "work/said").exists()


def test_slurm_saves_and_queues_the_job_again_when_time_runs_out(cluster, wait_for):
    wait = "import os, pathlib, signal, sys, time\n"
    wait += "here = pathlib.Path(os.environ['WORK']) / ('ready' + os.environ['NUMBER'])\n"
    wait += "def save(*_):\n    here.write_text('saved')\n    sys.exit(75)\n"
    wait += "signal.signal(signal.SIGTERM, save)\nhere.touch()\ntime.sleep(60)\n"
    cluster.python("jaxdyn", wait)
    command = ["bash", str(SCRIPTS / "slurm.sh"), "rl"]
    ready = [cluster.root / f"work/ready{number}" for number in range(2)]
    with subprocess.Popen(command, env=cluster.environment, cwd=cluster.root) as process:
        tasks = cluster.root / "work/tasks"
        wait_for(lambda: all(path.exists() for path in [*ready, tasks]), "the tasks run")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 0
    assert [path.read_text() for path in ready] == ["saved", "saved"]
    said = (cluster.root / "work/said").read_text().splitlines()
    assert said == ["scancel --signal=TERM 7", "scontrol requeue 7"]


@pytest.mark.parametrize(
    "arguments, missing, message",
    [
        ([], None, "slurm.sh: wanted a command of jaxdyn"),
        (["--preset", "x"], None, "slurm.sh: wanted a command of jaxdyn"),
        (["rl"], "jaxdyn", "slurm.sh: no jaxdyn on PATH"),
        (["rl"], "srun", "slurm.sh: no srun on PATH"),
    ],
)
def test_slurm_bad_input_is_one_line(arguments, missing, message, cluster):
    cluster.python("jaxdyn", "")
    if missing:
        (cluster.bin / missing).unlink()
    done = cluster.script(SCRIPTS / "slurm.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
