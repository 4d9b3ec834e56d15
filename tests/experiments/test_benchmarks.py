"""Every suite of every benchmark at a toy shape, so that none can rot; and how they fail."""

import argparse
import dataclasses
import functools
import itertools
import json
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import compilation
import engine
import harness
import influence
import interleave
import jax
import kernel_cases
import kernels
import ledger
import lengths
import loading
import numpy as np
import plans
import precision
import pytest
import reward
import rl_step
import rollout
import sketch
import tiny_runs
from peers.protocol import SHAPES

from jaxdyn.kernels import log_prob_kernel
from jaxdyn.models import save_pretrained
from jaxdyn.train import run_rl, sharing

STUB = Path(__file__).with_name("stub_peer.py")
EXPERIMENTS = Path(interleave.__file__).parent
TOY = SHAPES["toy"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a benchmark's `main` as its command would; its results by name."""
    monkeypatch.setattr(harness, "thermometer", lambda: 1.0)

    def run(script, *words):
        command = [script.__file__, *words, "--output", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        found = (tmp_path / "results").glob("*.json")
        return {path.stem: json.loads(path.read_text()) for path in found}

    return run


def stub(directory: Path, name: str = "works") -> str:
    """A "Python" that runs the stub, whatever script it is given."""
    path = directory / name
    path.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {STUB} {name} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# -- how a case fails -----------------------------------------------------------------------------


def case(code: str, cannot: str = "", timeout: float = 60.0) -> dict:
    return harness.in_a_process("peer", ["-c", code], timeout, cannot)


def test_a_case_is_the_last_line_of_its_process():
    assert case("print('noise'); print('{\"a\": 1}')") == {"a": 1}


@pytest.mark.parametrize("cannot", ["", "it is too large"])
def test_a_case_that_fails_ends_the_benchmark_with_its_last_line(cannot):
    with pytest.raises(SystemExit, match=r"^peer: ValueError: no such thing$"):
        case("raise ValueError('no such thing')", cannot)
    with pytest.raises(SystemExit, match=r"^peer: ended without a word$"):
        case("raise SystemExit(3)", cannot)


TOO_MUCH = {
    "killed": ("import os; os.kill(os.getpid(), 9)", 60.0),
    "RESOURCE_EXHAUSTED": ("raise RuntimeError('RESOURCE_EXHAUSTED: 18 TB')", 60.0),
    "stopped after 0 s": ("import time; time.sleep(60)", 0.3),
}


@pytest.mark.parametrize("words", TOO_MUCH)
def test_only_a_declared_case_may_run_out_of_memory_or_time(words):
    code, timeout = TOO_MUCH[words]
    with pytest.raises(SystemExit, match=f"^peer: .*{words}"):
        case(code, "", timeout)
    error = case(code, "it is too large", timeout)["error"]
    assert words in error and error.endswith("(it is too large)")


def test_an_unknown_suite_is_named(run):
    for script in (kernels, rl_step, rollout, plans):
        with pytest.raises(SystemExit, match=r"^unknown 'fast'; there are "):
            run(script, "fast")


# -- kernels --------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Cases in this process, and neural-tangents' own habits."""

    def in_this_process(name, command, timeout, cannot):
        assert command[0] == kernel_cases.__file__
        return json.loads(json.dumps(kernel_cases.run_case(**json.loads(command[1]))))

    monkeypatch.setattr(harness, "in_a_process", in_this_process)
    monkeypatch.setattr(kernel_cases, "problem", functools.cache(kernel_cases.problem))
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No Jacobian rule found")
        yield


@pytest.mark.slow
def test_kernels(run, here, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "AXES", {"sites": [2 / 3, 1], "slots": [0.5, 1]})
    found = run(kernels, "--toy")
    assert found.keys() == {f"kernels_{suite}_toy" for suite in kernels.SUITES}
    for suite in ("small", "trace", "pythia", "chat", "large"):
        cases = found[f"kernels_{suite}_toy"]["cases"]
        assert all(case["median_seconds"] > 0 for case in cases.values())
    peers = [name for name in kernels.METHODS if name.startswith("nt ")]
    ran = found["kernels_small_toy"]["cases"] | found["kernels_trace_toy"]["cases"]
    assert set(peers) < set(ran)
    assert set(found["kernels_large_toy"]["nt_batch"]) == {"4", "6"}
    axes = found["kernels_scaling_toy"]["axes"]
    values = {axis: x["values"] for axis, x in axes.items()}
    assert values == {"sites": [4, 6], "slots": [3, 6]}
    assert (tmp_path / "results/kernels_scaling_toy.png").stat().st_size > 5000


@pytest.mark.slow
def test_ledger(run, monkeypatch):
    peaks = {"nothing": 100, "pass": 10**6, "ledger": 5 * 10**6}

    def in_this_process(case, command, timeout):
        at = command.index("--case")
        monkeypatch.setattr(sys, "argv", [ledger.__file__, "--toy", *command[at:]])
        assert command[:2] == [ledger.__file__, "memory"] and command[at + 1] == case
        return {"peak_bytes": peaks[case], "check": ledger.CASES[case](ledger.parse())}

    monkeypatch.setattr(harness, "in_a_process", in_this_process)
    found = run(ledger, "--toy", "--rounds", "1")
    assert found.keys() == {f"ledger_{suite}_toy" for suite in ledger.SUITES}
    nodes, whole = found["ledger_nodes_toy"], found["ledger_whole_toy"]
    assert len(nodes["medians"]) == 4 and nodes["ratios"]["components"]["cores"] > 0
    assert all(x > 0 for clocks in nodes["medians"].values() for x in clocks.values())
    assert whole["nodes"] >= 3 and whole["residual"]["log_prob"] < 0.01

    memory, telemetry = found["ledger_memory_toy"], found["ledger_telemetry_toy"]
    # Embedding, W, four projections and three of the feed-forward, norms; in float32.
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert memory["parameters"] == (stored := 4 * (2 * 40 * 16 + 2 * layer + 16))
    assert memory["pass"] == 10**6 - 100 - 2 * stored
    assert memory["copies"] == pytest.approx((4 * 10**6 + 2 * stored) / stored)
    assert telemetry["rounds"][0].keys() == {"with", "without"}
    assert telemetry["share"] > 0 and len(telemetry["own"]) == 1


@pytest.mark.slow
def test_influence_beside_its_peer(run, tmp_path):
    """Ours really, the peer as a stub whose gradients are 7 projections' of two layers."""
    python = stub(tmp_path)
    found = run(influence, "--toy", "--rounds", "1", "--bergson-python", python)
    assert found.keys() == {"influence_influence_toy", "influence_peer_toy"}
    for ratio in found["influence_influence_toy"]["ratios"].values():
        assert ratio["wall"] > 0
    peer = found["influence_peer_toy"]
    assert peer["dimension"] == 2 * 7 * 8**2 >= 2 * peer["sketch"]["side"] ** 2
    assert peer["ratios"]["wall"] > 0 and peer["medians"]["bergson"]["cores"] == 1e-4
    # Of zeros everything is missing: the rms of the cosines, of which 1 in 8 is that of a row
    # with itself. And ours are estimates.
    assert 8**-0.5 < peer["errors"]["bergson"] < 1
    assert 0 < peer["errors"]["jaxdyn"] < 0.2


def test_influence_names_the_peer_that_is_missing(run):
    with pytest.raises(SystemExit, match=r"^bergson: no Python that has it; give --bergson-python"):
        run(influence, "peer", "--toy")


def test_exact_products_are_those_of_the_kernel():
    """Whole gradients against the sums over tokens of the kernel of log-probs."""
    model = influence.LanguageModel(ledger.TOY)
    params, r = model.init(jax.random.key(0)), ledger.completions(model, 3, 2, 2)
    every, linear = influence.exact_products(model, params, r)
    sites = ledger.every_token(r)
    kernel = log_prob_kernel(model, params, sites, by_part=True)
    total, parts = np.asarray(kernel.total), kernel.parts
    body = np.asarray(sum(parts[kind].sum(axis=0) for kind in ("attention", "mlp")))
    rows = np.asarray(sites.rows)
    by_completion = np.stack([rows == b for b in range(3)]).astype(float)
    for found, by_site in ((every, total), (linear, body)):
        wanted = by_completion @ by_site @ by_completion.T
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.slow
def test_precision(run):
    """Of a random toy: float32's errors, bfloat16's, and none of weights rounded beforehand."""
    shape = ["--prompts", "1", "--generations", "2", "--length", "6", "--sites", "1"]
    found = run(precision, "passes", "frozen", *shape)
    for error in found["precision_passes"]["errors"].values():
        assert error["float32"] < 1e-5 < 1e-3 < error["bfloat16"] < 0.1
    frozen = found["precision_frozen"]["errors"]
    assert all(error["bfloat16"] == 0 != error["float32"] for error in frozen.values())


def test_reward(run):
    shape = {"rows": 2, "slots": 8, "layers": 1, "width": 16, "vocab": 32, "rounds": 2}
    words = [word for name, size in shape.items() for word in (f"--{name}", str(size))]
    found = run(reward, *words)["reward"]
    assert len(found["rounds"]) == 2 and found["shape"]["slots"] == 8
    medians = found["medians"]
    assert found["ratios"]["texts"]["of_medians"] == medians["texts"] / medians["features"]


@pytest.mark.slow
def test_a_kernels_case_in_a_process_of_its_own():
    found = kernels.case("nt contraction", kernels.TOY, repeats=1)
    kernel = kernel_cases.METHODS["plain"].prepare(kernels.TOY)()
    np.testing.assert_allclose(found["check"], [np.sum(kernel), np.trace(kernel)], rtol=1e-5)


def test_a_peer_with_other_numbers_ends_the_benchmark():
    checks = {"gram": [1000.0, 600.0], "nt contraction": [1000.009, 600.0]}
    kernels.agree(checks)
    kernels.agree({**checks, "trace": [5.0, 5.0], "trace, 64 probes": [6.0, 6.0]})
    for wrong in ([1000.02, 600.0], [1000.0, 599.98], [float("nan"), 600.0]):
        with pytest.raises(SystemExit, match=r"^nt contraction: sum and trace .*by gram"):
            kernels.agree({**checks, "nt contraction": wrong})


# -- RL steps and rollouts ------------------------------------------------------------------------


def settings(*words: str) -> tuple[str, ...]:
    return "--shape", "toy", "--rounds", "2", "--warm-up", "1", *words


@pytest.mark.slow
def test_rl_step_alone(run, untyped, monkeypatch):
    """All suites without peers."""
    monkeypatch.setattr(rl_step, "LAYOUTS", ((3, 1),))
    monkeypatch.setattr(rl_step, "VARIANTS", (("float32", "none", 1), ("bfloat16", "full", 2)))
    found = run(rl_step, "stages", "telemetry", "memory", "rate", "sharing", *settings())
    ratios = found["rl_step_stages_toy"]["ratios"]
    assert ratios["product_flops"] > 5 and ratios["peak_bytes"] > 3
    assert found["rl_step_stages_toy"]["harvest"]["largest_difference"] < 1e-5
    (layout,) = found["rl_step_telemetry_toy"]["layouts"]
    assert layout["sites"] == 6 and len(layout["probe_seconds"]) == 2
    wide, narrow = found["rl_step_memory_toy"]["cases"]
    assert 0 < narrow["temporary_bytes"] < wide["temporary_bytes"]
    apart, together = (found["rl_step_sharing_toy"]["costs"][way] for way in ("apart", "together"))
    # 4 rows of 4 + 6 slots, and 2 of 4 + 12: 1.25 of what goes by slots; of attention's pairs 1.47.
    assert 1.2 < apart["product_flops"] / together["product_flops"] < 1.3
    rate = found["rl_step_rate_toy"]
    assert rate["model_flops"] == pytest.approx(wide["product_flops"]) and rate["share"] > 0


def test_loading(run, monkeypatch):
    in_this_process = lambda name, command, **_: loading.load(Path(command[-2]), command[-1], 0)
    monkeypatch.setattr(harness, "in_a_process", in_this_process)
    found = run(loading, "--scale", "8", "--layers", "1", "--limit", "0")["loading"]
    config = loading.shape_of(8, 1)
    # Two tables, and of a layer query, out, key and value of a quarter each, and the MLP's three.
    products = 2.5 * config.width**2 + 3 * config.width * config.mlp_width
    size = 2 * config.vocab_size * config.width + products + 3 * config.width
    for one in found["loads"].values():
        assert one["bytes"] == 4 * size and one["peak_bytes"] >= 0


@pytest.mark.slow
def test_rl_step_compiles_nothing_after_the_first_of_each_kind(run, monkeypatch):
    in_this_process = lambda name, command, **_: compilation.run(Path(command[1]), command[2])
    monkeypatch.setattr(harness, "in_a_process", in_this_process)
    found = run(rl_step, "compile", *settings("--architecture", "gpt_neox"))
    for one in found["rl_step_compile_toy"]["runs"].values():
        assert len(one["ended"]) == len(one["compiled"]) == 16
        assert one["compiled_after_the_first_of_each_kind"] == 0


@pytest.mark.slow
def test_rl_step_beside_its_peers(run, monkeypatch, tmp_path):
    """Ours and the floor really, the others as stubs."""
    monkeypatch.setattr(interleave, "ARCHITECTURES", ("llama",))
    python = stub(tmp_path)
    found = run(rl_step, "peers", *settings("--tunix-python", python, "--trl-python", python))
    found = found["rl_step_peers_toy"]
    assert found["about"].keys() == {"jaxdyn llama", "floor", "tunix llama", "trl llama"}
    assert found["without"] == [] and len(found["rounds"]) == 2
    for seconds in found["medians"].values():
        assert seconds.keys() == {"step", "generate", "reference", "update"}
    assert found["ratios"].keys() == {"floor", "tunix llama", "trl llama"}


@pytest.mark.slow
def test_rl_step_of_a_checkpoint(run, monkeypatch, tmp_path):
    """Ours really, of its weights; TRL as a stub. Results do not say where the model lies."""
    python, directory = stub(tmp_path), tmp_path / "tiny"
    model = engine.model_of(TOY, "llama")
    params = model.init(jax.random.key(7))
    save_pretrained(directory, model, params)
    task = engine.task_of(dataclasses.replace(TOY, model=str(directory)), "llama")
    chex.assert_trees_all_equal(task.params, params)

    given = "--model", str(directory), "--trl-python", python
    monkeypatch.setattr(rl_step, "SUITES", {"peers": rl_step.peers})
    found = run(rl_step, "peers", *settings(*given, "--without", "tunix"))["rl_step_peers_toy"]
    assert found["about"].keys() == found["peak_mebibytes"].keys() == {"jaxdyn llama", "trl llama"}
    assert found["shape"]["model"] == "tiny" and str(tmp_path) not in json.dumps(found)
    # A process that has imported JAX, and one that has not.
    assert found["peak_mebibytes"]["jaxdyn llama"] > 3 * found["peak_mebibytes"]["trl llama"] > 0

    with pytest.raises(SystemExit, match=r"^tunix trains a random model here; .*--without tunix$"):
        run(rl_step, "peers", *settings(*given, "--tunix-python", python))
    given = "--without", "tunix", "--trl-python", python, "--model"
    with pytest.raises(SystemExit, match=r"^.*: no config.json there; --model wants"):
        run(rl_step, "peers", *settings(*given, str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    words = r"model_type is 'gpt2'; the peers train llama or gpt_neox$"
    with pytest.raises(SystemExit, match=words):
        run(rl_step, "peers", *settings(*given, str(tmp_path)))
    words = r"are \(1, 16, 32, 2, 32\); the shape says \(1, 16, 32, 2, 9\)"
    with pytest.raises(SystemExit, match=words):
        engine.task_of(dataclasses.replace(TOY, vocab=9, model=str(directory)), "llama")


@pytest.mark.slow
def test_rollout(run, monkeypatch, tmp_path):
    """Ours really, once; the others, and the other cases, by stubs."""
    script = str(EXPERIMENTS / "jaxdyn_worker.py")
    ours, theirs = [sys.executable, script, "llama"], [stub(tmp_path), "some_worker.py"]
    commands = itertools.chain([ours], itertools.repeat(theirs))
    each = lambda chosen: {"jaxdyn llama": next(commands), "floor": theirs}
    monkeypatch.setattr(interleave, "frameworks", each)
    found = run(rollout, *settings("--without", "tunix", "trl"))["rollout_toy"]
    assert found.keys() - {"machine"} == rollout.CASES.keys()
    assert found["plain"]["without"] == ["tunix", "trl"]
    about, speed = found["plain"]["about"]["jaxdyn llama"], found["plain"]["speed"]["jaxdyn llama"]
    # Embedding, W, four projections and three of the feed-forward, three norms.
    assert about["parameters"] == 2 * 32 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    seconds = found["plain"]["medians"]["jaxdyn llama"]["generate"]
    assert speed["tokens_per_second"] == pytest.approx(4 * 6 / seconds)
    assert found["long"]["shape"]["completion_length"] == 256


def test_the_bandwidth_floor_reads_weights_and_filled_slots_once_a_step():
    # 5 steps; 1000 weights less the embedding's 32 * 16, and 4 rows of 4 + 3 slots of 2 * 16.
    assert rollout.bytes_of_decoding(TOY, 1000) == 5 * 4 * (1000 - 512 + 4 * 7 * 32)


@pytest.mark.parametrize("given, missing", [((), "tunix"), (("--without", "tunix"), "trl")])
def test_a_peer_without_a_python_ends_the_benchmark(given, missing, run, monkeypatch):
    monkeypatch.setattr(rl_step, "SUITES", dict.fromkeys(rl_step.SUITES))  # nothing runs before
    words = f"^{missing}: no Python that has it; give --{missing}-python PATH .*--without {missing}"
    for script, suites in ((rl_step, ["stages", "peers"]), (rollout, [])):
        with pytest.raises(SystemExit, match=words):
            run(script, *suites, *settings(*given))


@pytest.mark.parametrize(
    "name, patience, words",
    [
        ("dies", 100.0, "peer: RuntimeError: out of ideas"),
        ("hangs", 2.0, "peer: stopped after 2 s without an answer"),
    ],
)
def test_a_peer_that_stops_ends_the_benchmark(name, patience, words, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "thermometer", lambda: 1.0)
    monkeypatch.setattr(interleave, "PATIENCE", patience)
    command = {"peer": [stub(tmp_path, name), "some_worker.py"]}
    monkeypatch.setattr(interleave, "frameworks", lambda chosen: command)
    chosen = argparse.Namespace(rounds=2, warm_up=1, without=[])
    with pytest.raises(SystemExit, match=f"^{words}$"):
        interleave.interleaved(TOY, "step", chosen)


# -- plans ----------------------------------------------------------------------------------------


@pytest.fixture
def as_the_command_sets_it(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # to be set back


def test_a_plan_that_cannot_be_made_ends_the_benchmark(run, as_the_command_sets_it, capfd):
    """And the command knows every option that it is given."""
    with pytest.raises(subprocess.CalledProcessError):
        run(plans, "plans", "--cases", "tiny v9:1x1")
    assert "no chip 'v9' in topology 'v9:1x1'" in capfd.readouterr().err


def test_what_a_run_of_the_papers_model_stores():
    """Weights, the reference's, and two moments of what moves, in float32; counted by hand."""
    width, vocab, layers = 2560, 50304, 32
    head = vocab * width
    whole = 2 * head + layers * (12 * width**2 + 13 * width) + 2 * width
    stored = {row["stage"]: row["stored"] for row in plans.stored_on_one("h200")}
    assert stored == {
        "stage 1": pytest.approx(4 * (2 * whole + 2 * head), abs=100),
        "stage 2": pytest.approx(4 * 4 * whole, abs=100),
    }


@pytest.mark.slow
def test_weak_scaling(run, as_the_command_sets_it, monkeypatch):
    sizes = {"vocab_size": 32, "width": 16, "num_layers": 1, "num_heads": 2}
    monkeypatch.setattr(plans, "MODEL", sizes)
    monkeypatch.setattr(plans, "DEVICES", (2,))
    rows = run(plans, "scaling")["plans_scaling"]["rows"]
    found = {(row["axis"], row["stage"]): row for row in rows}
    for axis in ("data", "fsdp"):
        # A device's 8 sequences of 64 tokens, forward, and backward to W alone.
        assert found[axis, "stage 1"]["flops"] == 2 * 2 * (8 * 64) * 32 * 16
        assert found[axis, "stage 2"]["flops"] > 10 * found[axis, "stage 1"]["flops"]
    for stage in ("stage 1", "stage 2"):
        data, fsdp = found["data", stage], found["fsdp", stage]
        # Beside the gradients' sum, a few metrics.
        assert 0 < data["collective_bytes"] - data["expected_bytes"] < 100
        assert fsdp["collective_bytes"] > fsdp["expected_bytes"] > data["expected_bytes"]


def test_queries_of_a_file_of_sketches():
    with sketch.random_file(300, 4, 2) as (model, path):
        found = sketch.query_seconds(model, path, 2, 2)
    assert (found["rows"], found["queries"]) == (300, 2) and 0 < found["s"] < 10


@pytest.mark.slow
def test_lengths(run, tmp_path, monkeypatch):
    """Completions of up to eight tokens, packed whatever it saves."""
    monkeypatch.setattr(sharing, "SMALLEST_STEP", 1)
    changes = {"train__steps": 1, "evaluation__every": 0}
    directory = run_rl(tiny_runs.rl_config(tmp_path, "run", **changes))
    found = run(lengths, str(directory), "--batches", "1", "--rounds", "1")["lengths"]
    for case in (found["before"], found["after"]):
        assert 0 <= case["packed"]["padding"][0] <= case["padded"]["padding"][0] < 1
        assert len(case["packed"]["seconds"]) == len(case["padded"]["seconds"]) == 1
