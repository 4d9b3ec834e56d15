"""What a page lets its browser do: show what is in the file, and run its own script alone."""

import base64
import hashlib


def content_policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy: no network, images within the page, and this style and script.

    What a model wrote is in the page as text; were it taken for markup, it could load and run
    nothing.
    """
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    runs = "" if script is None else f"script-src 'sha256-{digest(script)}'; "
    shows = "img-src data:; " if script is None else ""
    return (
        f"default-src 'none'; {runs}{shows}style-src 'sha256-{digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
