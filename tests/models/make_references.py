"""Write `references/logits.npz`: the logits that transformers computes on the tiny checkpoints.

Run `python tests/models/make_references.py` with the extra `parity` installed.
"""

import tempfile
from pathlib import Path

import numpy as np
import tiny_checkpoints

REFERENCES = Path(__file__).parent / "references" / "logits.npz"


def load(directory):
    """The transformers model of a checkpoint, in float32, with plain attention."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    problems = {name: list(found) for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def logits(model):
    """Logits on `tiny_checkpoints.batch`; a token's position is its place among the tokens."""
    import torch

    tokens, mask = tiny_checkpoints.batch()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions).long(),
        )
    return out.logits.float().numpy()


def main():
    _, mask = tiny_checkpoints.batch()
    # What stands on padding is nobody's business; zeros compress.
    arrays = {}
    for name, config in tiny_checkpoints.CONFIGS.items():
        with tempfile.TemporaryDirectory() as directory:
            model = load(tiny_checkpoints.write(Path(directory), config))
        arrays[name] = logits(model) * mask[..., None]
    REFERENCES.parent.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCES, **arrays)
    for name, array in arrays.items():
        print(f"{name:28} rms {np.sqrt(np.mean(array[mask] ** 2)):.2f}")


if __name__ == "__main__":
    main()
