"""tpu/tpu: exact commands, bad input, and a slice that is refused, preempted, lost or broken."""

import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = Path(__file__).parents[2] / "tpu"
RL = ("rl", "--preset", "anagrams", "--model.path", "two words")
DRY_RUNS = {
    "create": ("create",),
    "create_job": ("create", *RL),
    "setup": ("setup",),
    "run": ("run", *RL),
    "babysit": ("babysit", *RL),
    "status": ("status",),
    "logs": ("logs",),
    "logs_one": ("logs", "3"),
    "stop": ("stop",),
    "fetch": ("fetch",),
    "fetch_all": ("fetch", "--all"),
    "delete": ("delete",),
}


# -- dry runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_exact_commands_and_does_nothing(name, box):
    done = box.tpu(*DRY_RUNS[name], "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(str(box.local), "LOCAL") == (GOLDEN / f"{name}.txt").read_text()
    assert box.calls() == [] and not box.local.exists()


def test_a_dry_run_needs_no_gcloud_and_may_be_asked_for_anywhere(box):
    (box.bin / "gcloud").unlink()
    orders = [("--dry-run", "run", *RL), ("run", "--dry-run", *RL), ("run", *RL, "--dry-run")]
    said = [box.tpu(*order) for order in orders]
    assert [done.returncode for done in said] == [0, 0, 0]
    assert said[0].stdout == said[1].stdout == said[2].stdout != ""


@pytest.mark.parametrize(
    "accelerator, kind, runtime",
    [
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v3-8", "v3-8", "tpu-ubuntu2204-base"),
        ("v2-8", "v2-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_image_follows_the_accelerator(accelerator, kind, runtime, box):
    words = shlex.split(created(box, TPU_ACCELERATOR=accelerator))
    assert f"--accelerator-type={kind}" in words and f"--runtime-version={runtime}" in words
    words = shlex.split(created(box, TPU_ACCELERATOR=accelerator, TPU_RUNTIME="other"))
    assert "--runtime-version=other" in words


@pytest.mark.parametrize(
    "capacity, flags", [("spot", {"--spot"}), ("reserved", {"--reserved"}), ("on-demand", set())]
)
def test_capacity(capacity, flags, box):
    words = shlex.split(created(box, TPU_CAPACITY=capacity, TPU_CREATE_FLAGS="--network=a --x"))
    assert {"--spot", "--reserved"} & set(words) == flags
    assert words[-3:-1] == ["--network=a", "--x"]


def created(box, **changes):
    """The line of a dry run that creates the slice."""
    lines = box.tpu("create", "--dry-run", **changes).stdout.splitlines()
    (line,) = (line for line in lines if "queued-resources create" in line)
    return line


def test_settings_may_be_in_a_file_of_ones_own_and_the_environment_wins(box):
    mine = box.root / "mine.sh"
    mine.write_text(f'TPU_ACCELERATOR=v6e-8\nsource "{SCRIPTS}/settings.sh"\n')
    assert "--accelerator-type=v6e-8" in created(box, TPU_SETTINGS=str(mine))
    assert "--accelerator-type=v4-8" in created(box, TPU_ACCELERATOR="v4-8")


@pytest.mark.parametrize(
    "words, output",
    [
        (("rl",), ["--output", "gs://my-bucket/first/run"]),
        (("sft", "--seed", "1"), ["--output", "gs://my-bucket/first/run"]),
        (("rl", "--output", "gs://other/run"), []),
        (("rl", "--output=gs://other/run"), []),
        (("report", "gs://my-bucket/first/run"), []),
    ],
)
def test_a_run_goes_to_the_bucket_unless_the_command_says_where(words, output, box):
    lines = box.tpu("run", *words, "--dry-run").stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("#   COMMAND="))
    inside = line.removeprefix("#   COMMAND=(").removesuffix(")")
    assert shlex.split(inside) == [*words, *output]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, changes, message",
    [
        (["create"], {"TPU_PROJECT": ""}, "TPU_PROJECT is not set"),
        (["create"], {"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        (["create"], {"TPU_BUCKET": ""}, "TPU_BUCKET is not set"),
        (["create"], {"TPU_PROJECT": "My Project"}, "TPU_PROJECT: got 'My Project', wanted"),
        (["create"], {"TPU_ZONE": "us-west4"}, "TPU_ZONE: got 'us-west4', wanted a zone"),
        (["create"], {"TPU_BUCKET": "my-bucket"}, "TPU_BUCKET: got 'my-bucket', wanted gs://"),
        (["create"], {"TPU_BUCKET": "gs://b/$(id)"}, "TPU_BUCKET: got 'gs://b/$(id)', wanted"),
        (["create"], {"TPU_NAME": "First_run"}, "TPU_NAME: got 'First_run', wanted"),
        (["create"], {"TPU_NAME": "a; rm -r b"}, "TPU_NAME: got 'a; rm -r b', wanted"),
        (["create"], {"TPU_NAME": "a" * 64}, "wanted at most 63"),
        (["create"], {"TPU_ACCELERATOR": "v9-8"}, "TPU_ACCELERATOR: got 'v9-8', wanted"),
        (["create"], {"TPU_ACCELERATOR": "v4"}, "TPU_ACCELERATOR: got 'v4', wanted"),
        (["create"], {"TPU_ACCELERATOR": "v5p-0"}, "TPU_ACCELERATOR: got 'v5p-0', wanted"),
        (["create"], {"TPU_CAPACITY": "cheap"}, "TPU_CAPACITY: got 'cheap', wanted spot"),
        (["create"], {"TPU_PATIENCE": "-1"}, "TPU_PATIENCE: got '-1', wanted a whole number"),
        (["create"], {"TPU_KEEP": "maybe"}, "TPU_KEEP: got 'maybe', wanted yes or no"),
        (["create"], {"TPU_FILES": "nowhere"}, "TPU_FILES: no directory 'nowhere'"),
        (["run"], {}, "run needs a command"),
        (["run", "--preset", "x"], {}, "got '--preset' where a command of jaxdyn is wanted"),
        (["babysit"], {}, "babysit needs a command the first time"),
        (["logs", "first"], {}, "logs: got 'first', wanted a worker's number"),
        (["fetch", "here"], {}, "fetch: got 'here', wanted nothing or --all"),
        (["delete", "first"], {}, "delete: got 'first', wanted nothing more"),
        (["destroy"], {}, "no command 'destroy'"),
    ],
)
def test_bad_input_is_one_line_before_anything_else(arguments, changes, message, box):
    done = box.tpu(*arguments, **changes)
    assert done.returncode == 2
    assert done.stderr.startswith("tpu: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert box.calls() == [] and not box.local.exists()


def test_without_gcloud(box):
    (box.bin / "gcloud").unlink()
    done = box.tpu("create")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tpu: gcloud is not installed, or not on PATH\n"


def test_help_needs_no_settings_and_names_every_command(box):
    done = box.tpu("help", TPU_PROJECT="")
    assert done.returncode == 0
    for name in ("create", "setup", "run", "babysit", "status", "logs", "stop", "fetch", "delete"):
        assert f"\n  {name} " in done.stdout


# -- one command at a time ------------------------------------------------------------------------


def test_create_and_delete_may_be_given_twice(box):
    assert [box.tpu("create").returncode for _ in range(2)] == [0, 0]
    assert box.verbs() == ["describe", "create", "describe"]
    assert [box.tpu("delete").returncode for _ in range(2)] == [0, 0]
    assert box.verbs()[3:] == ["describe", "delete", "describe"]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_takes_the_place_of_a_dead_request(state, box):
    box.add_slice()
    box.states(state)
    assert box.tpu("create", "rl").returncode == 0
    assert box.verbs() == ["describe", "delete", "create"]


def test_the_startup_script_carries_the_command(box):
    assert box.tpu("create", *RL).returncode == 0
    text = (box.fake / "startup-1").read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "COMMAND=('rl' '--preset' 'anagrams' '--model.path' 'two words' '--output'" in text
    assert text.endswith((SCRIPTS / "worker.sh").read_text())


def test_run_waits_for_the_slice_and_sends_the_job_to_every_worker(box):
    box.add_slice()
    box.states("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert box.tpu("run", "rl").returncode == 0
    assert box.verbs() == ["describe"] * 4 + ["scp", "ssh"]
    assert box.calls()[-1][-1] == "--command=sudo bash /tmp/jaxdyn-job.sh start"
    assert "--worker=all" in box.calls()[-1] and "--worker=all" in box.calls()[-2]


@pytest.mark.parametrize("command", [("run", "rl"), ("setup",)])
def test_a_slice_that_is_not_there_is_not_waited_for(command, box):
    done = box.tpu(*command)
    assert done.returncode == 2
    assert done.stderr == "tpu: first is ABSENT: tpu/tpu create, then again\n"


def test_a_set_up_alone_does_not_take_the_jobs_place(box):
    box.add_slice()
    box.tpu("run", "rl")
    job = (box.local / "first/job.sh").read_text()
    assert box.tpu("setup").returncode == 0
    assert (box.local / "first/job.sh").read_text() == job
    assert "COMMAND=()" in (box.local / "first/setup.sh").read_text()


def test_status_tells_the_slice_and_its_workers_in_order(box):
    assert box.tpu("status").stdout == "first: ABSENT\n"
    box.add_slice()
    box.reports("worker 1: running|worker 0: done")
    assert box.tpu("status").stdout == "first: ACTIVE\nworker 0: done\nworker 1: running\n"
    box.reports("unreachable")
    done = box.tpu("status")
    assert done.returncode == 2 and "ssh says why in" in done.stderr
    assert (box.local / "first/ssh.log").read_text() == "unreachable\n"


def test_logs_and_stop_of_a_slice_that_is_not_active(box):
    assert box.tpu("logs").returncode == 2
    assert box.tpu("stop").returncode == 0
    assert box.verbs() == ["describe", "describe"]


@pytest.mark.parametrize("command", [("create",), ("status",), ("delete",)])
def test_what_gcloud_complains_about_is_passed_on_in_a_line(command, box):
    (box.fake / "broken").touch()
    done = box.tpu(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "ERROR: (gcloud) PERMISSION_DENIED: no access" in done.stderr


def test_the_last_commit_is_what_the_workers_install(box):
    """In a copy of the scripts: the archive holds what was committed, not what was changed."""
    checkout = box.root / "checkout"
    shutil.copytree(SCRIPTS, checkout / "tpu")
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    (checkout / "tpu/slurm.sh").write_text("changed")
    done = box.script(checkout / "tpu/tpu", "create", "rl", TPU_PACKAGE="", TPU_LOCAL="runs")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "tpu: changes that are not committed are not packed\n"
    (archive,) = (checkout / "runs/first").glob("jaxdyn-*.tar.gz")
    assert [
        "storage",
        "cp",
        str(archive),
        f"gs://my-bucket/first/job/{archive.name}",
    ] in box.calls()
    assert (
        f"PACKAGE=gs://my-bucket/first/job/{archive.name}\n" in (box.fake / "startup-1").read_text()
    )
    with tarfile.open(archive) as packed:
        for name in ("tpu", "slurm.sh"):
            file = packed.extractfile(f"jaxdyn/tpu/{name}")
            assert file is not None and file.read() == (SCRIPTS / name).read_bytes()


# -- babysit --------------------------------------------------------------------------------------


def test_babysit_recreates_a_preempted_slice_under_the_same_run(box):
    box.states("ACCEPTED", "ACTIVE", "SUSPENDED", "ACTIVE")
    box.reports("worker 0: running|worker 1: running", "worker 0: done|worker 1: done")
    done = box.tpu("babysit", *RL)
    assert done.returncode == 0, done.stderr
    assert box.verbs() == [
        *("describe", "create"),  # absent
        *("describe", "describe", "ssh"),  # ACCEPTED, ACTIVE: running
        *("describe", "delete"),  # SUSPENDED
        *("describe", "create"),  # absent
        *("describe", "ssh"),  # ACTIVE: done
        *("rsync", "delete"),
    ]
    creates = [call for call in box.calls() if "create" in call]
    assert creates[0] == creates[1]
    scripts = [(box.fake / name).read_text() for name in ("startup-1", "startup-2")]
    assert scripts[0] == scripts[1] and "'gs://my-bucket/first/run'" in scripts[0]
    assert not box.has_slice()


def test_babysit_may_be_stopped_and_begun_again_without_its_command(box):
    box.reports("worker 0: done")
    assert box.tpu("babysit", *RL).returncode == 0
    first = (box.fake / "startup-1").read_text()
    (box.fake / "calls").unlink()
    assert box.tpu("babysit").returncode == 0
    assert (box.fake / "startup-1").read_text() == first


def test_babysit_starts_its_job_on_a_slice_that_was_there(box):
    box.add_slice()
    box.reports("worker 0: running", "worker 0: done")
    assert box.tpu("babysit", "rl").returncode == 0
    verbs = ["describe", "scp", "ssh", "ssh", "describe", "ssh", "rsync", "delete"]
    assert box.verbs() == verbs


def test_babysit_replaces_a_slice_whose_chip_is_held(box):
    busy = "worker 0: running|worker 1: busy, log x: /dev/vfio/0: Device or resource busy"
    box.reports(busy, "worker 0: done|worker 1: done")
    assert box.tpu("babysit", "rl").returncode == 0
    verbs = ["describe", "create", "describe", "ssh", "delete"]
    assert box.verbs() == [*verbs, "describe", "create", "describe", "ssh", "rsync", "delete"]


@pytest.mark.parametrize("keep", ["no", "yes"])
def test_babysit_ends_with_a_run_that_failed_and_points_to_its_logs(keep, box):
    line = "worker 1: failed with exit code 2, log /var/lib/jaxdyn/logs/a.log: jaxdyn: no such"
    box.reports(f"worker 0: running|{line}")
    done = box.tpu("babysit", "rl", TPU_KEEP=keep)
    assert done.returncode == 1
    assert line in done.stderr and f"logs in {box.local}/first/logs" in done.stderr
    assert box.has_slice() == (keep == "yes")


def test_babysit_keeps_the_slice_when_its_logs_cannot_be_fetched(box):
    (box.fake / "no-bucket").touch()
    box.reports("worker 0: failed with exit code 1")
    done = box.tpu("babysit", "rl")
    assert done.returncode == 1 and box.has_slice()
    assert "so the slice stays, and costs: tpu/tpu logs, tpu/tpu delete" in done.stderr


def test_babysit_gives_up_on_a_request_that_always_fails(box):
    box.states("FAILED")
    done = box.tpu("babysit", "rl")
    assert done.returncode == 1
    assert done.stderr.endswith("tpu: giving up after 3 looks in a row\n")
    assert box.verbs().count("create") == 3 and box.verbs().count("delete") == 2


def test_babysit_gives_up_when_gcloud_does_not_answer(box):
    (box.fake / "broken").touch()
    done = box.tpu("babysit", "rl")
    assert done.returncode == 1
    assert done.stderr.count("PERMISSION_DENIED") == 3 and set(box.verbs()) == {"describe"}


def test_babysit_replaces_a_slice_that_answered_and_is_lost(box):
    box.reports("worker 0: running", *["unreachable"] * 3, "worker 0: done")
    done = box.tpu("babysit", "rl")
    assert done.returncode == 0, done.stderr
    assert box.verbs().count("create") == 2
    assert "the workers answered once and are lost" in done.stderr


def test_babysit_does_not_delete_a_slice_that_never_answered(box):
    box.reports("unreachable")
    done = box.tpu("babysit", "rl")
    assert done.returncode == 1 and box.has_slice()
    assert "delete" not in box.verbs()


def test_one_worker_that_is_not_done_is_waited_for(box):
    looks = ["worker 0: done|worker 1: running", "worker 0: done|worker on x: booting"]
    box.reports(*looks, "worker 0: done|worker 1: done")
    assert box.tpu("babysit", "rl").returncode == 0
    assert box.verbs().count("ssh") == 3


@pytest.mark.parametrize("word", ["failed to connect", "busy", "done"])
def test_a_logs_last_line_is_not_a_state(word, box):
    box.reports(f"worker 0: waiting to start again, log x: {word}", "worker 0: done")
    assert box.tpu("babysit", "rl").returncode == 0
    verbs = ["describe", "create", "describe", "ssh", "describe", "ssh", "rsync", "delete"]
    assert box.verbs() == verbs


def test_nothing_is_created_when_the_package_cannot_be_sent(box):
    """An upload that fails ends the command: the workers would find no package."""
    box.program("gcloud", (box.bin / "gcloud").read_text() + '[[ "$*" != "storage rsync "* ]]\n')
    files = box.root / "files"
    files.mkdir()
    for command in ("create", "babysit"):
        done = box.tpu(command, "rl", TPU_FILES=str(files))
        assert done.returncode != 0
    assert "create" not in box.verbs()


# -- shellcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cloud.sh", "settings.sh", "worker.sh", "slurm.sh"])
def test_shellcheck(name):
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    command = [program, "--external-sources", "--source-path=SCRIPTDIR", str(SCRIPTS / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
