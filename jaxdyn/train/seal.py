"""Checksums of a checkpoint's files, written before it gets its name, so that damage is found.

Of checkpoints on disk: a store of objects looks after its own.
"""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from orbax.checkpoint.path import atomicity

from jaxdyn.errors import JaxdynError
from jaxdyn.storage.files import write_file
from jaxdyn.storage.reading import read_object

NAME = "checksums.json"

SAVED = "saved"
"""A file among the checkpoints, which says that there has been one."""


class Sealed(atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a checkpoint that is yet to be whole: its last act is to seal it."""

    async def finalize(self, *args: Any, **options: Any) -> None:
        final = Path(self.get_final())
        is_step = final.name.isdigit()  # its items are written in such places too
        if is_step:
            await asyncio.to_thread(seal, Path(self.get()))
        await super().finalize(*args, **options)
        if is_step:
            (final.parent / SAVED).touch()


def seal(step: Path) -> None:
    """Write the checksums of all that a checkpoint holds; Orbax's notes beside it go on."""
    found = {name: [path.stat().st_size, digest(path)] for name, path in files_of(step).items()}
    write_file(step / NAME, json.dumps({"sha256": found}, indent=1) + "\n")


def damage(step: Path) -> str | None:
    """What is not as it was when the checkpoint was made, in words; None if nothing is.

    A checkpoint without checksums, which an earlier version made, has nothing to be held against.
    """
    if not (step / NAME).exists():
        return None
    try:
        sealed = read_object(step / NAME)["sha256"]
        known = {name: (int(size), str(sha)) for name, (size, sha) in sealed.items()}
    except (JaxdynError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return f"{step / NAME} is damaged"
    there = files_of(step)
    for name, (size, sha) in known.items():
        if name not in there:
            return f"{step / name} is missing"
        if there[name].stat().st_size != size or digest(there[name]) != sha:
            return f"{step / name} has changed since it was saved"
    return None


def is_sealed(step: Path) -> bool:
    """Whether a checkpoint has checksums."""
    return (step / NAME).exists()


def files_of(step: Path) -> dict[str, Path]:
    """The files of a checkpoint's items, by their names in it."""
    paths = sorted(p for p in step.rglob("*") if p.is_file() and p.parent != step)
    return {path.relative_to(step).as_posix(): path for path in paths}


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
