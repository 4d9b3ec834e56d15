"""TRL: GRPOTrainer's steps, or transformers' generate alone, on a random model of any shape.

    python trl_worker.py SHAPE step|generate llama|gpt_neox [MICROBATCHES]

With a `model` in the shape it is that checkpoint, whose tokens are given the words' names. A step
begins and ends where the trainer says `on_step_begin`. float32, or everything in bfloat16: the
parameters and Adam's moments too, half the memory traffic of float32 master weights.
Gradient checkpointing, TRL's default, is off: it would cost it a forward pass. Environment:

    python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
"""

import os
import sys
import tempfile

from protocol import BEGIN, END, PAD, WORDS, Runner, even_words, random_prompts

runner = Runner()
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}

import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402

shape = runner.shape
MICROBATCHES = int(sys.argv[4]) if len(sys.argv) > 4 else 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model_of_shape():
    """A Llama or GPT-NeoX, untied, and a tokenizer of the words w0, w1, ..."""
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": max(512, shape.slots),
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
    }
    torch.manual_seed(0)
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    }
    config, kind = kinds[sys.argv[3]]
    if shape.model:
        model = kind.from_pretrained(shape.model)
        model.generation_config = transformers.GenerationConfig()
    else:
        model = kind(config(**sizes))
    model = model.to(getattr(torch, shape.dtype))
    # Special tokens are matched inside words, so that none may begin one: "w1" would split "w17".
    special = ("<pad>", "<s>", "</s>")
    vocabulary = {special[i] if i < WORDS else f"w{i}": i for i in range(shape.vocab)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token=special[PAD],
        bos_token=special[BEGIN],
        eos_token=special[END],
    )
    return model, tokenizer


def finish(result) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def generate(model, tokenizer):
    model = model.to(DEVICE).eval()
    prompts = [p for p in random_prompts(shape, shape.prompts) for _ in range(shape.generations)]
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    sampling = transformers.GenerationConfig(
        max_new_tokens=shape.completion_length,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=PAD,
        eos_token_id=END,
        disable_compile=True,  # as TRL has it
    )
    for _ in runner.turns():
        with torch.no_grad():
            finish(model.generate(**inputs, generation_config=sampling))


class Turns(transformers.TrainerCallback):
    """A step of the trainer for each that is asked for."""

    def __init__(self):
        self._turns = runner.turns()

    def on_step_begin(self, *arguments, **options):
        finish(None)
        if next(self._turns, None) is None:
            sys.exit()


def learn(model, tokenizer):
    with tempfile.TemporaryDirectory() as directory:
        # The reference model is read again from where the policy came from.
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        model = type(model).from_pretrained(directory, dtype=getattr(torch, shape.dtype))
        settings = trl.GRPOConfig(
            output_dir=directory,
            use_cpu=DEVICE == "cpu",
            bf16=shape.dtype == "bfloat16",
            fp16=False,
            gradient_checkpointing=False,
            # What is generated at once is learned from in so many pieces.
            per_device_train_batch_size=shape.rows // MICROBATCHES,
            gradient_accumulation_steps=MICROBATCHES,
            num_generations=shape.generations,
            max_completion_length=shape.completion_length,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.04,
            epsilon=0.2,
            num_iterations=1,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=1e-6,
            optim="adamw_torch",
            max_steps=10**6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=even_words,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": random_prompts(shape, 2048)}),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )
        time_parts(trainer)
        trainer.train()


def time_parts(trainer):
    """Clocks on generation and reference; the update is forward, backward, clip and Adam."""
    logps = trainer._get_per_token_logps_and_entropies
    reference = runner.timed("reference", logps, finish)
    trainer._generate_single_turn = runner.timed("generate", trainer._generate_single_turn, finish)
    trainer._get_per_token_logps_and_entropies = lambda model, *inputs, **options: (
        reference if model is trainer.ref_model else logps
    )(model, *inputs, **options)
    trainer.compute_loss = runner.timed("update", trainer.compute_loss, finish)
    trainer.accelerator.backward = runner.timed("update", trainer.accelerator.backward, finish)
    trainer.accelerator.clip_grad_norm_ = runner.timed(
        "update", trainer.accelerator.clip_grad_norm_, finish
    )
    create = trainer.create_optimizer

    def create_timed(*arguments, **options):
        optimizer = create(*arguments, **options)
        optimizer.step = runner.timed("update", optimizer.step, finish)
        return optimizer

    trainer.create_optimizer = create_timed


def main():
    model, tokenizer = model_of_shape()
    runner.ready(
        versions={m.__name__: m.__version__ for m in (trl, torch, transformers)},
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    generate(model, tokenizer) if runner.task == "generate" else learn(model, tokenizer)


if __name__ == "__main__":
    main()
