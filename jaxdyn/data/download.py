"""Files of public data sets, from the Hugging Face hub and checked against the digests it gives.

The hub's client keeps what it fetched under its digest in its own cache ($HF_HOME), and nothing
that was cut short. A digest is looked at again each time a data set is built.
"""

import hashlib
import os
import re
from pathlib import Path

from jaxdyn.types import JaxdynError


def fetch(repository: str, file: str, revision: str) -> Path:
    """A data set's file at a revision, as it was fetched now or before.

    Raises:
      JaxdynError: if the hub cannot be reached or has no such file, or for a file that is not what
        the hub said it would send; it is thrown away then.
    """
    from huggingface_hub import hf_hub_download

    name = f"{repository}/{file} at {revision[:12]}"
    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except Exception as error:  # whatever its network stack raises, which differs by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise JaxdynError(
            f"cannot download {name} ({reason:.200}); data.path takes a copy of the data set"
        ) from error
    expected = Path(os.readlink(path)).name if path.is_symlink() else ""
    found = digest(path, expected)
    if found != expected and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
        path.resolve().unlink()
        path.unlink()
        raise JaxdynError(
            f"the download of {name} is damaged: its digest is {found}, wanted {expected}; "
            "it was removed, try again"
        )
    return path


def digest(path: Path, like: str) -> str:
    """A file's digest of the kind that the hub gives: Git's SHA-1, or SHA-256 of large files."""
    with path.open("rb") as file:
        if len(like) != 40:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
        while part := file.read(1 << 20):
            found.update(part)
        return found.hexdigest()
