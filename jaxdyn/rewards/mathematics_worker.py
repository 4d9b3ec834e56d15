"""The process of `jaxdyn.rewards.mathematics`: JSON in, JSON out, a line each. Needs no jaxdyn."""

import json
import signal
import sys


def main() -> None:
    sys.path[:] = sys.argv[1:]  # as in the process that asks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input, not by Ctrl-C
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever it says, it is no answer
    from math_verify import parse, verify

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(judged(parse, verify, **asked)), file=answers, flush=True)


def judged(parse, verify, wanted: str, completion: str, timeout: int) -> float | None:
    """1.0, 0.0, or None where `wanted` cannot be read, even as a formula."""
    read = lambda text: parse(text, parsing_timeout=timeout)
    texts = (wanted if "$" in wanted or "\\boxed" in wanted else f"${wanted}$", wanted)
    gold: list = next((found for text in texts if (found := read(text))), [])
    if not gold:
        return None
    return float(verify(gold, read(completion), timeout_seconds=timeout))


if __name__ == "__main__":
    main()
