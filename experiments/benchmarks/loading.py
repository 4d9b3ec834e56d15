"""How much of the host's memory it takes to load a checkpoint.

Claim:     a checkpoint of Llama-3-8B's proportions loads in a process that may hold at most 1.2
           times its parameters (float32) beside what it held before, on one device and on a mesh.
Command:   python experiments/benchmarks/loading.py --scale 4 --limit 1.2
           --scale divides width, heads, MLP and vocabulary: 4 is half a billion parameters.
Time:      a minute on two CPU cores; 1 GB of disk for the checkpoint, in bfloat16, in shards.
Expected:  a line a layout, results/loading.json.

On a CPU the devices' memory is the host's, so all that a load needs is counted; on others only what
is on its way. The kernel refuses more (RLIMIT_DATA: memory that no file stands behind; pages of the
checkpoint that are mapped can be dropped at any time and do not count).
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import tempfile
import threading
import time
from pathlib import Path

import harness

LAYOUTS = {"one device": {}, "fsdp 2 x tensor 2": {"fsdp": 2, "tensor": 2}}


def shape_of(scale: int, layers: int):
    """Llama-3-8B's, all that is not its depth divided."""
    from jaxdyn.models.shapes import SHAPES

    whole = dataclasses.replace(SHAPES["llama-8b"], num_layers=layers)
    names = ("vocab_size", "width", "mlp_width", "num_heads", "num_kv_heads")
    return dataclasses.replace(whole, **{name: getattr(whole, name) // scale for name in names})


def write_checkpoint(directory: Path, config, shards: int = 4) -> None:
    """Random weights in bfloat16, in files as the hub has them."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxdyn.models import LanguageModel
    from jaxdyn.models.hf_config import config_to_hf
    from jaxdyn.models.hf_layout import stored_tensors

    shapes = {n: s.shape for s in stored_tensors(LanguageModel(config)) for n in s.names}
    some = np.random.default_rng(0).normal(scale=0.02, size=4099).astype(ml_dtypes.bfloat16)
    names, index = list(shapes), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: np.resize(some, shapes[name]) for name in mine}, directory / file)
        index |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))


def held() -> int:
    """Bytes of this process that no file stands behind."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def load(directory: Path, layout: str, limit: float) -> dict:
    """Load it in this process, which may hold `limit` times as much more as it does now."""
    import jax

    from jaxdyn.distributed import Layout, make_mesh
    from jaxdyn.models import LanguageModel, load_pretrained, pretrained_config
    from jaxdyn.sections import MeshConfig

    sizes = LAYOUTS[layout]
    where = None
    if sizes:
        where = Layout(make_mesh(MeshConfig(1, **sizes, devices=4))).where
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    shapes = jax.eval_shape(LanguageModel(pretrained_config(directory)).init, jax.random.key(0))
    size = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    before, peak, done = held(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], held())

    if limit:
        with open("/proc/self/status") as file:
            data = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
        most = 1024 * data + int(limit * size)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    jax.block_until_ready(load_pretrained(directory, where=where)[1])
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    most = max(peak[0], held()) - before
    return {"bytes": size, "peak_bytes": most, "ratio": most / size, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=1.2, help="0 for none (1.2)")
    parser.add_argument("--load", nargs=2, metavar=("DIRECTORY", "LAYOUT"), help=argparse.SUPPRESS)
    harness.add_output(parser)
    chosen = parser.parse_args()
    if chosen.load:
        directory, layout = chosen.load
        print(json.dumps(load(Path(directory), layout, chosen.limit)))
        return
    found = {}
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), shape_of(chosen.scale, chosen.layers))
        stored = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
        for layout in LAYOUTS:
            command = [__file__, "--limit", str(chosen.limit), "--load", directory, layout]
            found[layout] = one = harness.in_a_process(layout, command, environ=environ)
            print(
                f"{layout}: {one['bytes'] / 2**20:.0f} MiB of parameters, at most "
                f"{one['peak_bytes'] / 2**20:.0f} MiB held ({one['ratio']:.3f} x), "
                f"{one['seconds']:.1f} s",
                flush=True,
            )
    content = {
        "scale": chosen.scale,
        "layers": chosen.layers,
        "limit": chosen.limit,
        "file_bytes": stored,
        "loads": found,
    }
    print(f"-> {harness.write(chosen.output, 'loading', content)}")


if __name__ == "__main__":
    main()
