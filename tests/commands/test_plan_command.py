"""`jaxdyn plan`: what does not fit together is said before anything is compiled."""

import json

import jax
import pytest

from jaxdyn.cli import main
from jaxdyn.commands import plan as command
from jaxdyn.models import LanguageModel
from jaxdyn.models.shapes import SHAPES
from jaxdyn.plan.demand import Demand
from jaxdyn.plan.hlo import Cost


@pytest.fixture
def refused(capsys, monkeypatch):
    """The line that a command which compiles nothing ends with."""

    def never(program, hosts):
        raise AssertionError(f"compiled {program.name}")

    monkeypatch.setattr(command, "demand_of", never)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["plan", *arguments])
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == ""
        (line,) = said.err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pythia-2.8"], "unknown preset 'pythia-2.8'; did you mean 'pythia-2.8b'?"),
        (["tiny", "--topology", "v5e:3x3"], "no slice 'v5e:3x3'; of v5e there are v5e:1x1"),
        (
            ["tiny", "--topology", "h200:9"],
            "no topology 'h200:9'; of h200 there are h200:1, 2, 4, 8",
        ),
        (["tiny", "--topology", "l4:8"], "no chip 'l4' in topology 'l4:8'; there are v4, v5e"),
        (["tiny", "--mesh.fsdp", "3"], "a mesh of data 1 x fsdp 3 x tensor 1 does not divide 8"),
        (["tiny", "--mesh.tensor", "8", "--mesh.fsdp", "1"], "does not divide num_heads 4"),
        (["tiny", "--mesh.data", "8", "--mesh.fsdp", "1", "--num-prompts", "4"], "the 4 of num_pr"),
        (["tiny", "--num-prompts", "1"], "no mesh of 8 devices suits this batch"),
        (["tiny", "--mesh.devices", "9"], "mesh.devices is 9; here (cpu) has 8"),
        (["tiny", "--meshes", "0"], "meshes must be at least 1, got 0"),
        (["tiny", "--num-generations", "0"], "num_generations must be at least 1, got 0"),
        (["tiny", "--remat", "some"], "some"),
        ([], "PRESET"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(arguments, words, refused):
    assert words in refused(*arguments)


def counted(presets):
    model = LanguageModel(SHAPES[presets])
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def test_the_presets_have_their_models_sizes():
    """As the model cards say: Pythia-2.8B 2,775,208,960 and Llama-3.1-8B 8,030,261,248."""
    assert counted("pythia-2.8b") == 2_775_208_960
    assert counted("llama-8b") == 8_030_261_248


@pytest.fixture
def compiled(monkeypatch):
    """The names of programs, in the place of their compilation."""
    seen = []

    def demand(program, hosts, options):
        seen.append(program.name)
        return Demand(program.name, {"parameters": 2**30}, 0, 2**30, 2**30, Cost(flops=1e12))

    monkeypatch.setattr(command, "demand_of", demand)
    return seen


def test_the_figures_are_written_and_compilations_bounded(compiled, tmp_path, capsys):
    path = tmp_path / "plan.json"
    main(["plan", "tiny", "--meshes", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    with pytest.raises(SystemExit):
        main(["plan", "tiny", "--json", __file__])
    assert len(compiled) == 2 * 3 + 6  # three programs a mesh, then the others of the best
    assert [way["mesh"] for way in found["meshes"]] == [[1, 8, 1], [2, 4, 1]]
    assert found["chip"] is None and found["largest_batch"] is None
    assert "8 devices, mesh (1, 8, 1)" in capsys.readouterr().out


@pytest.mark.parametrize("untie", [False, True])
def test_a_tied_model_has_no_stage_of_its_classifier_alone(untie, compiled, tmp_path, capsys):
    path = tmp_path / "plan.json"
    words = ["--num-prompts", "8", "--json", str(path), *(["--untie"] if untie else [])]
    main(["plan", "smollm2-135m", "--meshes", "1", "--mesh.fsdp", "1", "--mesh.data", "8", *words])
    found = json.loads(path.read_text())
    assert ("stage 1" in compiled) == untie and compiled.count("stage 2") == 1
    assert (found["stage_1_share"] is not None) == untie
    assert ("no stage 1" in capsys.readouterr().out) != untie
