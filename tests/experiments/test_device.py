"""All that measures a card, on the CPU at a toy shape: what it counts, says, and refuses."""

import argparse
import json
import sys

import device
import device_cases
import device_numbers
import harness
import jax
import jax.numpy as jnp
import pytest
import roofline
from peers.protocol import SHAPES
from test_benchmarks import stub

TOY = SHAPES["toy"]
RATES = roofline.Rates("float32", flops=1e9, bytes=1e8, kernels=1e5)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run `device.py` in this process, at given rates; its results by name."""
    monkeypatch.setattr(device, "in_a_process", device.measure)
    monkeypatch.setattr(roofline, "rates_of", lambda dtype: RATES)
    monkeypatch.setattr(harness, "thermometer", lambda: 1.0)

    def run(*words):
        command = ["device.py", *words, "--shape", "toy", "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "results")])
        device.main()
        found = (tmp_path / "results").glob("*.json")
        return {path.stem: json.loads(path.read_text()) for path in found}

    return run


def by_name(found):
    return {row["name"]: row for row in found["rows"]}


# -- what a program asks for ------------------------------------------------------------------


def test_kernels_and_bytes_of_a_loop_are_counted_as_often_as_it_runs():
    def program(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sort(x @ x), x)

    row = roofline.program("loop", jax.jit(program), (jnp.eye(16),), rates=RATES, rounds=1)
    assert row["flops"] == 7 * 2 * 16**3
    # A product and a sort a turn; beside them at most the counter's and a copy.
    assert 2 * 7 <= row["kernels"] <= 6 * 7
    # The product and the sort each read a matrix and write one.
    assert 7 * 4 * 16 * 16 * 4 <= row["nbytes"] <= 1.5 * 7 * 4 * 16 * 16 * 4
    assert row["own_bytes"] >= 2 * 16 * 16 * 4 and "measured_peak" not in row


FUSED = """HloModule two, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%both (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %sine = f32[8]{0} sine(%p)
  ROOT %twice = f32[8]{0} add(%sine, %sine)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %one = f32[8]{0} fusion(%x), kind=kLoop, calls=%both
  ROOT %two = f32[8]{0} copy(%one)
}
"""


def test_a_fusion_is_one_kernel():
    cost = roofline.Kernels(FUSED, 1, max, hosts=1).cost()
    assert cost.uncounted[roofline.KERNEL] == 2 and cost.bytes == 4 * 8 * 4


def test_a_carried_state_is_donated_and_goes_on():
    add = jax.jit(lambda state, x: (state + x, state), donate_argnums=0)
    row = roofline.program("add", add, (jnp.zeros(8), 1.0), rates=RATES, rounds=2, carried=True)
    assert len(row["seconds"]) == 2


@pytest.mark.parametrize(
    "asked, limit",
    [
        ({"flops": 6e8, "nbytes": 1e7, "kernels": 1e4}, "compute"),
        ({"flops": 2e8, "nbytes": 7e7, "kernels": 1e4}, "bandwidth"),
        ({"flops": 1e8, "nbytes": 1e7, "kernels": 4e4}, "launches"),
        ({"flops": 2e8, "nbytes": 1e7, "kernels": 1e4}, "overhead"),
    ],
)
def test_the_limit_is_the_largest_floor_where_they_explain_half_of_the_time(asked, limit):
    row = roofline.row("x", [0.9, 1.0, 1.1], RATES, **asked)
    assert row["limit"] == limit
    floors = [asked["flops"] / 1e9, asked["nbytes"] / 1e8, asked["kernels"] / 1e5]
    assert list(row["shares"].values()) == pytest.approx(floors)


def test_a_devices_rates(monkeypatch):
    monkeypatch.setattr(harness, "matrix_rate", lambda dtype: 5e9)
    monkeypatch.setattr(harness, "copy_rate", lambda: 6e9)
    rates = roofline.rates_of.__wrapped__("float32")
    assert (rates.flops, rates.bytes) == (5e9, 6e9) and 1e3 < rates.kernels < 1e8


# -- the parts ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_parts_in_full(run, untyped, monkeypatch, capsys):
    """All but the numbers; those of the ledger are its own benchmark's, which has its own test."""
    for name in ("nodes", "whole"):
        monkeypatch.setattr(device_cases.ledger_benchmark, name, lambda given: vars(given))
    parts = ("updates", "decoding", "steps", "kernels", "ledger")
    found = run(*parts, "--sites", "5")
    assert found.keys() == {f"device_cpu_{part}_toy" for part in parts}
    rows = by_name(found["device_cpu_updates_toy"])
    tokens, head = TOY.rows * TOY.completion_length, TOY.vocab * TOY.width
    # Forward, and backward to W alone; the joint update has the body's beside.
    assert rows["stage 1 update"]["flops"] == 2 * 2 * tokens * head
    assert rows["stage 2 update"]["flops"] > 3 * 2 * tokens * head
    for name in ("stage 1 update", "stage 2 update"):
        row = rows[name]
        assert row["flops_done"] >= row["flops"]
        floor = row["flops"] / RATES.flops / row["median_seconds"]
        assert row["shares"]["compute"] == pytest.approx(floor)
    found_decoding = found["device_cpu_decoding_toy"]
    rows = by_name(found_decoding)
    seconds = rows["rollout"]["median_seconds"]
    assert found_decoding["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert rows["rollout"]["kernels"] > TOY.completion_length * TOY.layers
    rows = by_name(found["device_cpu_kernels_toy"])
    # Pairs beside passes: a probe has the backward pass, and no forward one.
    assert rows.keys() == {"log-prob", "trace by probes", "sketch"}
    assert rows["trace by probes"]["flops"] > 10 * rows["log-prob"]["flops"]
    for stage in found["device_cpu_steps_toy"]["stages"].values():
        parts_of = stage["medians"]
        assert sum(parts_of.values()) - parts_of["step_time"] < parts_of["step_time"]
    assert found["device_cpu_ledger_toy"]["whole"]["toy"]
    # What is done is not run again, but shown.
    capsys.readouterr()
    monkeypatch.setattr(device, "PARTS", dict.fromkeys(device.PARTS))
    run("updates")
    said = capsys.readouterr().out
    assert "updates_toy: done" in said and "stage 2 update" in said
    with pytest.raises(TypeError):
        run("updates", "--again")


@pytest.mark.slow
def test_numbers_beside_float64(run, untyped, monkeypatch):
    """Some quantities of each kind: a pass, decoding, gradients by rows and packed, a kernel."""
    names = ("log-probs", "decoding", "ragged gradient", "packed rows", "log-prob kernel")
    few = {name: device_numbers.QUANTITIES[name] for name in names}
    monkeypatch.setattr(device_numbers, "QUANTITIES", few)
    found = run("numbers")["device_cpu_numbers_toy"]["dtypes"]
    assert found["float32"]["units"]["factors"] == 2.0**-24
    for name in names:
        wide, narrow = (found[dtype]["quantities"][name] for dtype in ("float32", "bfloat16"))
        assert 0 < wide["error"] < wide["tolerance"] < 1e-5
        assert 10 * wide["error"] < narrow["error"] < narrow["tolerance"] < 0.1
    # The same tokens in another precision, and no more.
    wrong = lambda model, given: (
        1.2 * device_numbers.log_probs(model, given) ** (1.0 + (model.dtype == jnp.bfloat16))
    )
    few["log-probs"] = device_numbers.Quantity(1, wrong)
    monkeypatch.setattr(device_numbers, "QUANTITIES", {"log-probs": few["log-probs"]})
    with pytest.raises(SystemExit, match=r"^log-probs in bfloat16: error .* above the 0\.0"):
        run("numbers", "--again")


def test_tolerances_follow_from_roundings():
    """By hand, of one layer whose sums are exact: 12 factors and 12 results rounded."""
    units = {"factors": 2.0**-8, "sum": 0.0, "result": 2.0**-8}
    expected = 3 * (3 * 24 / 3) ** 0.5 * 2.0**-8
    assert device_numbers.tolerance(TOY, units, passes=3) == pytest.approx(expected)
    rough = {**units, "factors": 2.0**-11, "result": 2.0**-24}
    assert device_numbers.tolerance(TOY, rough, 1) == pytest.approx(3 * 2 * 2.0**-11, rel=1e-3)


# -- processes and peers --------------------------------------------------------------------------


def test_trl_is_not_run_where_it_is_not(run, monkeypatch, capsys):
    monkeypatch.setattr(device, "python_with_trl", lambda chosen: "")
    assert run("trl") == {}
    assert "trl: not run, for there is no torch with TRL here" in capsys.readouterr().out


def test_trl_beside_us(run, monkeypatch, tmp_path):
    works, dies = stub(tmp_path), stub(tmp_path, "dies")
    monkeypatch.setattr(sys, "executable", works)
    found = run("trl", "--trl-python", works)["device_cpu_trl_toy"]
    assert found["frameworks"].keys() == {"jaxdyn", "trl"} and found["ratio"] > 0
    monkeypatch.setattr(device.interleave, "PATIENCE", 20.0)
    with pytest.raises(SystemExit, match=r"^trl: RuntimeError: out of ideas$"):
        run("trl", "--trl-python", dies, "--again")


def test_a_part_that_fails_in_its_process_ends_it():
    with pytest.raises(SystemExit, match=r"^trl: ended with exit code 1$"):
        device.in_a_process("trl", TOY, argparse.Namespace())  # without options


def test_an_unknown_part_is_named(run):
    with pytest.raises(SystemExit, match=r"^unknown 'fast'; there are numbers, updates"):
        run("fast")
