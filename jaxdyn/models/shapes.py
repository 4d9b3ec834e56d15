"""Public models by name, as their `config.json` has them: to plan for, without their weights."""

from typing import Any

from jaxdyn.models.config import Gating, ModelConfig, RotaryScaling, SequenceHead
from jaxdyn.models.families import gemma3_text, gpt_neox, llama, qwen2, qwen3

_LLAMA_3: dict[str, Any] = {
    **{"num_heads": 32, "num_kv_heads": 8, "mlp_width": 14336, "norm_eps": 1e-5},
}

SHAPES: dict[str, ModelConfig] = {
    # EleutherAI/pythia-2.8b, the paper's model.
    "pythia-2.8b": gpt_neox(vocab_size=50304, width=2560, num_layers=32, num_heads=32),
    # EleutherAI/pythia-70m.
    "pythia-70m": gpt_neox(vocab_size=50304, width=512, num_layers=6, num_heads=8),
    # meta-llama/Llama-3.1-8B.
    "llama-8b": llama(
        vocab_size=128256,
        width=4096,
        num_layers=32,
        max_positions=131072,
        rotary_base=500000.0,
        rotary_scaling=RotaryScaling("llama3", 8.0, 1.0, 4.0, 8192),
        **_LLAMA_3,
    ),
    # RLHFlow/ArmoRM-Llama3-8B-v0.1, the paper's reward model.
    "armorm-8b": llama(
        vocab_size=128257,
        width=4096,
        num_layers=32,
        max_positions=8192,
        rotary_base=500000.0,
        head=SequenceHead(19, 128256, Gating(width=1024, layers=3, temperature=10.0)),
        **_LLAMA_3,
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct.
    "smollm2-135m": llama(
        vocab_size=49152,
        width=576,
        num_layers=30,
        num_heads=9,
        mlp_width=1536,
        max_positions=8192,
        num_kv_heads=3,
        norm_eps=1e-5,
        rotary_base=100000.0,
        tied=True,
    ),
    # Qwen/Qwen2.5-0.5B.
    "qwen2.5-0.5b": qwen2(
        vocab_size=151936,
        width=896,
        num_layers=24,
        num_heads=14,
        mlp_width=4864,
        max_positions=32768,
        num_kv_heads=2,
        rotary_base=1000000.0,
        tied=True,
    ),
    # Qwen/Qwen3-0.6B.
    "qwen3-0.6b": qwen3(
        vocab_size=151936,
        width=1024,
        num_layers=28,
        num_heads=16,
        mlp_width=3072,
        max_positions=40960,
        num_kv_heads=8,
        head_dim=128,
        rotary_base=1000000.0,
        tied=True,
    ),
    # google/gemma-3-1b-it.
    "gemma-3-1b": gemma3_text(
        vocab_size=262144,
        width=1152,
        num_layers=26,
        num_heads=4,
        mlp_width=6912,
        max_positions=32768,
        num_kv_heads=1,
        head_dim=256,
        window=512,
    ),
    # karpathy/tinyllamas, stories260K.
    "stories260k": llama(
        vocab_size=512,
        width=64,
        num_layers=5,
        num_heads=8,
        mlp_width=172,
        max_positions=512,
        num_kv_heads=4,
        norm_eps=1e-5,
        tied=True,
    ),
    # What the quickstart makes, for its sixteen letters, "=" and three special tokens.
    "quickstart": gpt_neox(
        vocab_size=20,
        width=128,
        num_layers=2,
        num_heads=4,
        max_positions=64,
        rotary_fraction=1.0,
    ),
    "tiny": gpt_neox(vocab_size=512, width=64, num_layers=2, num_heads=4, max_positions=512),
}
