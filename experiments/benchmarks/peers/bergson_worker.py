"""bergson: gradients of completions of a Hugging Face model, every module's projected to p × p.

    python bergson_worker.py SHAPE gradients DIRECTORY SIDE

DIRECTORY is the model's and holds completions.json, {"input_ids": [...], "labels": [...]}; each
turn writes gradients.npy there, [N, modules · p²]. The model is loaded, batched (2048 tokens at a
time) and hooked as bergson's own build command does, but the gradients stay in memory. It has the
linear layers of the backbone; embeddings, norms and the classifier are left out, which is its
default.

Environment (a CPU needs no CUDA; what it imports of its dependencies is below):

    python3.11 -m venv bergson && bergson/bin/pip install torch==2.13.0 'transformers>=5' \\
        'peft>=0.17' datasets accelerate natsort petname simple-parsing scipy jaxtyping ml_dtypes \\
        torchopt pyyaml
    bergson/bin/pip install --no-deps bergson==2.5.1
"""

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from protocol import Runner

runner = Runner()
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bergson import CollectorComputer, GradientProcessor, InMemoryCollector  # noqa: E402
from bergson.config import IndexConfig  # noqa: E402
from bergson.data import allocate_batches  # noqa: E402
from bergson.utils.worker_utils import setup_model_and_peft  # noqa: E402
from datasets import Dataset  # noqa: E402


def main():
    directory, side = Path(sys.argv[3]), int(sys.argv[4])
    given = json.loads((directory / "completions.json").read_text())
    lengths = [len(row) for row in given["input_ids"]]
    with tempfile.TemporaryDirectory() as run:
        config = IndexConfig(
            run_path=f"{run}/run",
            model=str(directory),
            projection_dim=side,
            precision="fp32",
            loss_reduction="sum",
        )
        config.partial_run_path.mkdir()
        model, _ = setup_model_and_peft(config)
        processor = GradientProcessor(projection_dim=side)
        data, batches = Dataset.from_dict(given), allocate_batches(lengths, config.token_batch_size)

        def collect() -> InMemoryCollector:
            collector = InMemoryCollector(
                model=model.base_model, data=data, cfg=config, processor=processor
            )
            CollectorComputer(
                model, data, collector=collector, batches=batches, cfg=config
            ).run_with_collector_hooks()
            return collector

        runner.ready(
            versions={name: version(name) for name in ("bergson", "torch", "transformers")},
            device="cuda" if torch.cuda.is_available() else "cpu",
            threads=torch.get_num_threads(),
        )
        while runner.wait():
            began = time.process_time()
            found = collect().gradients
            runner.parts["cores"] = time.process_time() - began
            runner.answer()
            rows = [x.reshape(len(lengths), -1).float().numpy() for x in found.values()]
            np.save(directory / "gradients.npy", np.concatenate(rows, axis=1))


if __name__ == "__main__":
    main()
