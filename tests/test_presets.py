"""The presets: that they resolve, the sizes of their models, and what `jaxdyn presets` counts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jaxdyn.cli import main
from jaxdyn.commands.arguments import parse
from jaxdyn.commands.plan import planned_run
from jaxdyn.commands.plan_options import PlanOptions
from jaxdyn.config import KINDS
from jaxdyn.distributed import make_mesh
from jaxdyn.grammar import load_config, save_config
from jaxdyn.models import LanguageModel, llama
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.chips import CHIPS, GIB
from jaxdyn.plan.needs import Need, Sequences, least, needs, parameters, size
from jaxdyn.plan.programs import Setting
from jaxdyn.presets import PRESETS, REWARD, RL, SFT
from jaxdyn.sections import MeshConfig

COMMANDS = {"sft": SFT, "reward": REWARD, "rl": RL}
RUNS = [(name, command) for name, one in PRESETS.items() for command in one.runs]


@pytest.mark.parametrize("name, command", RUNS)
def test_a_preset_resolves_is_kept_and_overridden(name, command, tmp_path):
    config = COMMANDS[command][name]
    assert config is PRESETS[name].runs[command] and isinstance(config, KINDS[command])
    save_config(config, tmp_path / "config.json")
    assert load_config(KINDS[command], tmp_path / "config.json") == config
    words = ["--preset", name, "--optim.learning-rate", "0.5", "--output", "there"]
    other = parse(f"jaxdyn {command}", words, KINDS[command], COMMANDS[command])
    assert other.optim.learning_rate == 0.5 and other.output == "there"
    kept = {"output": config.output, "optim": config.optim}
    assert dataclasses.replace(other, **kept) == config


@pytest.mark.parametrize("name", [name for name in RL if not SHAPES[PRESETS[name].shape].tied])
def test_an_untied_preset_runs_classifier_first(name):
    words = ["--preset", name, "--optim.schedule", "classifier_first"]
    config = parse("jaxdyn rl", words, KINDS["rl"], RL)
    assert config.optim.schedule == "classifier_first" and config.optim.classifier_steps > 0


def llama_size(vocab, width, layers, kv_width, mlp, tied=True, biased=False):
    """By hand: q and o, k and v, three of the MLP, two norms a layer; and a last norm."""
    layer = 2 * width**2 + 2 * width * kv_width + 3 * width * mlp + 2 * width
    layer += (width + 2 * kv_width) if biased else 0
    return layers * layer + width + (1 if tied else 2) * vocab * width


def neox_size(vocab, width, layers):
    """By hand: query, key, value, out, up and down with biases, two norms; embedding and W."""
    layer = 12 * width**2 + (4 + 4 + 1) * width + 2 * 2 * width
    return layers * layer + 2 * width + 2 * vocab * width


# As the model cards say, where they do, and by hand.
SIZES = {
    "pythia-2.8b": (2_775_208_960, neox_size(50304, 2560, 32)),
    "pythia-70m": (70_426_624, neox_size(50304, 512, 6)),
    "smollm2-135m": (134_515_008, llama_size(49152, 576, 30, 192, 1536)),
    "qwen2.5-0.5b": (494_032_768, llama_size(151936, 896, 24, 128, 4864, biased=True)),
    "qwen3-0.6b": (596_049_920,) * 2,
    "stories260k": (260_032, llama_size(512, 64, 5, 32, 172)),
    "quickstart": (401_920, neox_size(20, 128, 2)),
    "armorm-8b": (
        7_511_320_957,
        llama_size(128257, 4096, 32, 1024, 14336)
        + (19 * 4096 + 19 * 19)
        + (4096 + 1) * 1024
        + 2 * (1024 + 1) * 1024
        + (1024 + 1) * 19
        + 1,
    ),
}


@pytest.mark.parametrize("shape", SIZES)
def test_the_models_have_their_sizes(shape):
    counted = sum(x.size for x in jax.tree.leaves(parameters(SHAPES[shape])))
    assert SIZES[shape] == (counted, counted)


def test_every_model_of_a_preset_is_counted():
    named = {one.shape for one in PRESETS.values()} | {one.scorer for one in PRESETS.values()}
    assert named - {None, ""} == SIZES.keys()


def test_the_paper_is_what_its_source_says():
    paper = RL["paper"]
    assert (paper.loss.loss_type, paper.optim.optimizer) == ("grpo", "adamw")
    assert paper.loss.beta > 0 and paper.optim.weight_decay == 0
    assert paper.sampling.max_completion_length == 512
    epoch = 61_135 / paper.train.num_prompts
    assert 0 <= paper.train.steps - 6 * epoch < 1 and 0 <= paper.optim.classifier_steps - epoch < 1
    assert (paper.data.name, SFT["paper"].data.name) == ("ultrafeedback", "alpaca_farm")
    assert paper.reward.functions == ("model",) and "ArmoRM" in paper.reward.model.path
    assert paper.model.path == f"{SFT['paper'].output}/model"


# -- what they need -------------------------------------------------------------------------------

TINY = llama(64, width=16, num_layers=3, num_heads=2, mlp_width=24, num_kv_heads=1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_memory_is_that_of_the_plans_programs(tied):
    shape = dataclasses.replace(TINY, tied=tied)
    run = planned_run(PlanOptions("tiny", num_prompts=4, num_generations=2, max_prompt_length=8))
    setting = Setting(shape, run, make_mesh(MeshConfig(), jax.devices()[:1]))
    found = {need.stage: need for need in needs(shape, run)}
    assert list(found) == ["rollout", *([] if tied else ["stage 1"]), "stage 2"]
    programs = [setting.rollout(), setting.update("joint")]
    programs += [] if tied else [setting.update("classifier")]
    for program in programs:
        planned = {}
        for trees in (program.roles, program.held):
            for role, tree in trees.items():
                planned[role] = planned.get(role, 0) + size(tree)
        counted = dict(found[program.name].stored)
        if tied:  # a plan has views, of which the matrix is in both halves
            matrix = 4 * 64 * 16
            planned["reference"] -= matrix
            if program.name == "rollout":  # and leaves the two tables of the head out there
                planned["parameters"] -= matrix
                planned["optimizer"] += 2 * matrix
        assert counted == {role: n for role, n in planned.items() if n}
    # By hand: four bytes of what moves, and of a shared matrix once more.
    moving = 4 * llama_size(64, 16, 3, 8, 24, tied)
    assert found["stage 2"].gradient == moving + tied * 4 * 64 * 16
    if not tied:
        assert found["stage 1"].gradient == 4 * 64 * 16


@pytest.mark.parametrize("shape", [TINY, SHAPES["tiny"]], ids=["llama", "gpt_neox"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_what_is_kept_is_what_differentiation_keeps(shape, remat):
    """The arrays that a vjp holds grow by so much for each sequence more."""
    model, slots = LanguageModel(shape, jnp.float32, remat), 8

    def kept(rows):
        def residuals(params):
            ones = jnp.ones((rows, slots), jnp.int32)
            features = lambda p: model.features(p["backbone"], ones, ones.astype(bool))
            return jax.vjp(features, params)[1]

        found = jax.eval_shape(residuals, parameters(shape))
        stacked = lambda x: x.ndim > 2 and x.shape[0] == shape.num_layers
        return sum(size(x) for x in jax.tree.leaves(found) if stacked(x))

    config = RL["quickstart"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    counted = Sequences(shape, config).kept
    assert kept(6) - kept(5) == 4 * slots * shape.num_layers * counted


def test_the_fewest_chips_that_hold_and_divide_it():
    config, chip = RL["quickstart"], CHIPS["v5e"]  # sixteen prompts, 16 GiB
    ask = lambda gib: least(SHAPES["quickstart"], config, [Need("x", {"y": gib * GIB})], chip)
    assert [ask(14), ask(15), ask(28), ask(29)] == [1, 2, 2, 4]
    assert ask(15 * 16) is None  # seventeen would do, and sixteen prompts have no more rows


def test_the_command_prints_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", never)
    main(["presets", "paper", "stories260k", "--json", str(tmp_path / "presets.json")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "presets.json").read_text())
    assert list(found) == ["paper", "stories260k"]
    paper = found["paper"]
    assert (paper["parameters"], paper["reward_model_parameters"]) == (2775208960, 7511320957)
    stages = paper["commands"]["rl"]["stages"]
    assert list(stages) == ["rollout", "stage 1", "stage 2"]
    for stage in stages.values():
        parts = [*stage["stored"].values(), stage["gradient"], stage["activations"]]
        assert stage["peak"] == sum(parts)
    # Keys and values in bfloat16: 32 layers of 2560, of 128 prompts and 1024 completions.
    assert stages["rollout"]["stored"]["cache"] == 2 * 32 * 2560 * 2 * 512 * (128 + 1024)
    assert (
        "rl: stage 1" in said and "jaxdyn rl --preset paper" in said and "All else is ours" in said
    )
    assert "to be given: --model.path" in said
    (row,) = (line for line in said.splitlines() if line.lstrip().startswith("paper  "))
    assert row.split()[1:3] == ["2.78", "B"]
    other = tmp_path / "other.json"
    other.write_text('{"paper": 1, "mine": 2}')
    with pytest.raises(SystemExit):
        main(["presets", "paper", "--json", str(other)])
    assert "already exists and is no list of presets" in capsys.readouterr().err
    assert other.read_text() == '{"paper": 1, "mine": 2}'
    with pytest.raises(SystemExit):
        main(["presets", "papre"])
    assert "did you mean 'paper'?" in capsys.readouterr().err
