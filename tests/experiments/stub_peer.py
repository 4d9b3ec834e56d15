"""A peer without a model: speaks the runners' protocol, as `python stub_peer.py SCRIPT SHAPE TASK`.

A SCRIPT that names "dies" stops in the middle of its work, one that names "hangs" never answers.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments/benchmarks/peers"))
script = sys.argv.pop(1)

from protocol import Runner  # noqa: E402

runner = Runner()
if runner.task == "gradients":
    directory, side = Path(sys.argv[3]), int(sys.argv[4])
runner.ready(versions={}, device="none", parameters=2 * runner.shape.vocab * runner.shape.width)
for turn in runner.turns():
    if "dies" in script and turn == 1:
        raise RuntimeError("out of ideas")
    if "hangs" in script and turn == 1:
        time.sleep(600)
    if runner.task == "gradients":  # of nothing, by bergson's layout for two layers
        import numpy as np

        rows = len(json.loads((directory / "completions.json").read_text())["input_ids"])
        np.save(directory / "gradients.npy", np.zeros((rows, 2 * 7 * side**2), np.float32))
        runner.parts["cores"] = 1e-4
    if runner.task == "step":
        runner.parts = dict.fromkeys(("generate", "reference", "update"), 1e-4)
