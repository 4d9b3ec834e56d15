"""A box for the scripts: a PATH with a few programs and a cloud that is not there, nothing else."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu"
PROGRAMS = (
    "bash cat chmod cmp cp cut date dirname env flock git grep gzip head hostname install ln mkdir"
    " mv nohup rm sed setsid sleep sort stat tail tar tee touch tr true wc"
)


class Box:
    """Runs the scripts; no real `gcloud` and none of the caller's variables can be reached."""

    def __init__(self, root: Path):
        self.root = root
        self.bin = root / "bin"
        self.fake = root / "fake"
        self.local = root / "local"
        self.bin.mkdir()
        self.fake.mkdir()
        for program in PROGRAMS.split():
            (self.bin / program).symlink_to(shutil.which(program))
        self.program("gcloud", (Path(__file__).parent / "fake_gcloud.sh").read_text())
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(root),
            "FAKE": str(self.fake),
            "TPU_PROJECT": "my-project",
            "TPU_ZONE": "us-west4-a",
            "TPU_BUCKET": "gs://my-bucket",
            "TPU_NAME": "first",
            "TPU_PACKAGE": "jaxdyn[tpu]",
            "TPU_LOCAL": str(self.local),
            "TPU_POLL_SECONDS": "0",
            "TPU_PATIENCE": "3",
        }
        self.states("ACTIVE")
        self.reports("worker 0: running")

    def program(self, name: str, text: str, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name: str, text: str, folder: Path | None = None) -> None:
        self.program(name, f"#!{sys.executable}\n{text}", folder)

    def states(self, *states: str) -> None:
        (self.fake / "states").write_text("".join(f"{state}\n" for state in states))

    def reports(self, *looks: str) -> None:
        (self.fake / "reports").write_text("".join(f"{look}\n" for look in looks))

    def has_slice(self) -> bool:
        return (self.fake / "slice").exists()

    def add_slice(self) -> None:
        (self.fake / "slice").touch()

    def calls(self) -> list[list[str]]:
        """The arguments of every `gcloud` so far."""
        path = self.fake / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.rstrip("\x1f").split("\x1f") for line in lines]

    def verbs(self) -> list[str]:
        """What was done to the slice: describe, create, delete, ssh, scp, rsync, in order."""
        known = ("describe", "create", "delete", "ssh", "scp", "rsync", "cp")
        return [next(word for word in call if word in known) for call in self.calls()]

    def script(self, path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        """Run to its end; both streams as text."""
        return subprocess.run(
            ["bash", str(path), *arguments],
            env=self.environment | changes,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def tpu(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        return self.script(SCRIPTS / "tpu", *arguments, **changes)


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


@pytest.fixture
def wait_for():
    """Wait until a condition holds; it must within half a minute, or `seconds`."""

    def wait(condition, what: str, seconds: float = 30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.02)

    return wait
