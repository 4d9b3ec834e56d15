"""Trainings at a toy size, the scripts that read them, and the page that is made of the answers."""

import importlib
import json
import re

import algorithms
import classifier_first
import confidence
import frame
import histories
import matplotlib.pyplot as plt
import numpy as np
import page
import pytest
import run
import shuffled
import tiny_runs
import trainings

ARMS = ("joint", "joint_extra", "classifier_first")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three arms of two seeds, of base models of their own."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXDYN_CACHE", str(output / "cache"))
        trainings.train_all("toy", ARMS, output, None, 2)
    return output


@pytest.fixture(scope="module")
def answers(runs, tmp_path_factory):
    """What the scripts say of them."""
    results = tmp_path_factory.mktemp("docs") / "results/findings"
    told = ["--runs", str(runs), "--name", "toy", "--size", "toy", "--output", str(results)]
    for script in ("classifier_first", "confidence", "best_of_n"):
        run.ask(script, told)
    return results


def test_seeds_differ_and_arms_of_a_seed_are_pairs(runs):
    assert frame.arms(runs) == sorted(ARMS)
    of = lambda arm, seed: runs / arm / f"seed-{seed}"
    for seed in (0, 1):
        config = json.loads((of("joint", seed) / "config.json").read_text())
        assert config["seed"] == seed and config["model"]["path"].endswith(f"base-{seed}")
        assert config["data"]["anagrams"]["seed"] == seed
    losses = lambda arm, seed: [
        (line["step"], line.get("loss"), line.get("eval_entropy"))
        for line in tiny_runs.lines(of(arm, seed), "metrics.jsonl")
    ]
    # The extra steps come after; so joint training is their beginning, to the bit.
    long, short = losses("joint_extra", 0), losses("joint", 0)
    assert len(long) == len(short) + 2 and long[: len(short)] == short
    assert losses("joint", 1)[0] != short[0]


def test_what_is_there_is_not_trained_again(runs, monkeypatch):
    for trains in ("run_rl", "run_sft"):  # the arms, and their base models
        monkeypatch.setattr(trainings, trains, lambda config: pytest.fail("trained again"))
    trainings.train_all("toy", ARMS, runs, None, 2)


@pytest.mark.parametrize("arm", trainings.ARMS)
def test_every_arm_is_a_configuration(arm, runs):
    config = trainings.config_of("toy", arm, runs, runs / "base-0", 5)
    assert config.output.endswith(f"{arm}/seed-5") and config.train.steps == 4
    multiplier = arm.partition("_m")[2]
    if multiplier.isdigit():
        assert config.optim.classifier_multiplier == float(multiplier)
    assert config.kind == ("sft" if arm in trainings.SUPERVISED else "rl")


@pytest.mark.parametrize("preset", ["stories", "chat"])
def test_a_model_of_others_is_trained_in_as_many_steps_by_every_arm(preset, tmp_path):
    """But for the classifier stage's, which come on top."""
    of = lambda arm: trainings.config_of(preset, arm, tmp_path, tmp_path / "model", 3)
    plain = of("joint")
    for arm in trainings.OF_PRESET[preset]:
        config = of(arm)
        assert (config.seed, config.train, config.data) == (3, plain.train, plain.data), arm
        assert config.model.path == str(tmp_path / "model"), arm
        assert config.optim.classifier_steps == plain.optim.classifier_steps > 0, arm


def test_shuffled_rewards_stay_in_their_group():
    prompts = ["a="] * 4 + ["b="] * 4
    texts, scores = [f"t{i}" for i in range(8)], [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
    found = shuffled.within_groups(prompts, texts, scores)
    assert sorted(found[:4]) == scores[:4] and sorted(found[4:]) == scores[4:]
    assert found == shuffled.within_groups(prompts, texts, scores)
    # Of many draws every completion gets the group's mean.
    draws = [
        shuffled.within_groups(prompts[:4], [f"{n}{t}" for t in texts[:4]], scores[:4])
        for n in range(2000)
    ]
    np.testing.assert_allclose(np.mean(draws, axis=0), 1.5, atol=5 * np.sqrt(1.25 / 2000))


def test_the_scripts_answer(answers):
    for script in ("classifier_first", "confidence", "best_of_n"):
        content = json.loads((answers / f"toy/{script}.json").read_text())
        assert (answers / f"toy/{script}.png").stat().st_size > 10_000
        assert content["verdicts"] and all(v["ruling"] == "undecided" for v in content["verdicts"])
        assert str(answers.parent) not in json.dumps(content)


def test_histories_are_the_logs(runs):
    found = histories.histories(runs)["joint_extra"]["seed-1"]
    lines = tiny_runs.lines(runs / "joint_extra/seed-1", "metrics.jsonl")
    evaluated = [line for line in lines if "eval_reward" in line]
    assert found["steps"] == [0, 2, 4, 6] == [line["step"] + 1 for line in evaluated]
    assert found["reward"] == [line["eval_reward"] for line in evaluated]
    assert found["best"] == [line["eval_best_of@4"] for line in evaluated]
    assert found["kl"][1] == np.mean([line["kl"] for line in lines[1:3]]) and found["kl"][0] == 0


# -- what the rows say ----------------------------------------------------------------------------


def history(rewards, entropies, kl=(0.0, 0.1, 0.2), best=None):
    return {
        **{"base": "base-0", "steps": [0, 10, 20], "reward": list(rewards)},
        **{"entropy": list(entropies), "kl": list(kl), "best": list(best or rewards)},
        **{"tokens": [0, 1, 2], "seconds": [0.0, 10.0, 20.0]},
    }


def seeds(make, count=6):
    return {f"seed-{k}": make(0.001 * k) for k in range(count)}


def test_classifier_first_says_who_is_ahead():
    """RL comes to 0.6 in 10 steps and 0.7 in 20; with m = 10 to 0.8. CF-RL to 0.5 and 0.65; 0.7."""
    extra = lambda e: history((0.3, 0.6, 0.7 + e), (1.0, 0.8, 0.6))
    found = {
        "joint": seeds(lambda e: history((0.3, 0.45, 0.6 + e / 2), (1.0, 0.9, 0.8))),
        "joint_extra": seeds(extra),
        "joint_extra_m10": seeds(lambda e: history((0.3, 0.6, 0.8 + e / 3), (1.0, 0.8, 0.6))),
        "classifier_only": seeds(lambda e: history((0.3, 0.3, 0.4), (1, 1, 1), (0, 0, 0.1))),
        "classifier_only_m10": seeds(lambda e: history((0.3, 0.4, 0.7), (1, 1, 1), (0, 0, 0.1))),
        "classifier_first": seeds(lambda e: history((0.3, 0.31, 0.65), (1.0, 0.9, 0.5))),
        "classifier_first_m10": seeds(lambda e: history((0.3, 0.5, 0.7 - e), (1.0, 0.8, 0.6))),
    }
    pace = {"joint": 1.0, "classifier": 0.25}
    rows = {"classifier_steps": 10, "seconds_a_step": pace, "runs": found}
    by_claim = {v.claim: v for v in classifier_first.verdicts(rows)}
    value = lambda words: next(v for claim, v in by_claim.items() if words in claim)
    drift = np.mean([0.001 * k for k in range(6)])
    for words, wanted, ruling in (
        ("equal steps", 0.05 - drift / 2, "supported"),
        ("equal samples", -0.05 - drift, "not supported"),
        ("of W's own", 0.1 - drift * 2 / 3, "supported"),
        ("m is tuned", -0.1 - drift * 4 / 3, "not supported"),
        ("moving the body", 0.1 + drift / 3, "supported"),
        ("moves the reward little", 0.5 * 0.3 - 0.01, "supported"),
        # In the time of 12.5 of its steps RL has come to 0.625.
        ("equal time", 0.025 - drift / 4, "supported"),
    ):
        verdict = value(words)
        assert verdict.value == pytest.approx(wanted), words
        assert (verdict.ruling, verdict.seeds) == (ruling, 6), words
    assert value("moving the body").note == (
        "RL is 0.10 nats a token farther from the start. "
        "Chosen were joint_extra_m10 against classifier_only_m10."
    )
    spent = np.mean([0.5 / 0.35 - 0.4 / (0.4 + 0.001 * k) for k in range(6)])
    assert value("more entropy").value == pytest.approx(spent)


def test_algorithms_compare_at_equal_kl_and_reward():
    """At a KL of 0.1 whitened has 0.5, CF-RL 0.4; at a reward of 0.6 the budget leaves 0.9."""
    found = {
        "whitened_first": seeds(lambda e: history((0.3, 0.5, 0.55 + e), (1, 0.9, 0.85))),
        "classifier_first": seeds(
            lambda e: history((0.3, 0.4, 0.5), (1, 0.8, 0.6), kl=(0, 0.1, 0.2))
        ),
        "spill_0": seeds(lambda e: history((0.3, 0.6, 0.7), (1, 1, 1), best=(0.8, 0.9, 0.95))),
        "entropy_0.01": seeds(
            lambda e: history((0.3, 0.5, 0.6), (1, 1, 1), best=(0.8, 0.8, 0.85 + e))
        ),
        "entropy_0.03": seeds(lambda e: history((0.3, 0.4, 0.6), (1, 1, 1), best=(0.8, 0.7, 0.7))),
    }
    first, second, third, fourth = algorithms.verdicts({"runs": found})
    drift = np.mean([0.001 * k for k in range(6)])
    assert first.value == pytest.approx(0.05 + drift) and first.ruling == "supported"
    # At 5, 7 and 9 tenths of the rise to 0.5 CF-RL has 0.8, 0.72 and 0.64 nats, whitened 0.95, 0.93
    # and 0.91.
    assert second.value == pytest.approx((0.15 + 0.21 + 0.27) / 3)
    assert second.ruling == "supported"
    assert third.value == pytest.approx(0.05 - drift)
    assert third.note == "Chosen were spill_0 against entropy_0.01."
    assert fourth.value == pytest.approx(0.1)
    figure = algorithms.draw({"runs": found}, "x")
    assert figure.axes[0].get_xlabel().startswith("KL")
    plt.close(figure)


def test_places_are_matched():
    """Ten tokens at the first place and two at the second, or two and ten: two count at each."""
    masks = tuple(np.arange(2)[None] < lengths[:, None] for lengths in
                  (np.array([1] * 8 + [2] * 2), np.array([2, 2])))  # fmt: skip
    before, after = np.tile([4.0, 1.0], (10, 1)), np.tile([3.0, 0.0], (2, 1))
    assert confidence.matched(before, after, masks) == [2.5, 1.5]


# -- the page -------------------------------------------------------------------------------------


def recomputed(results):
    """Every kept answer's verdicts, and what the script says of the kept rows."""
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        again = importlib.import_module(content["script"]).verdicts(content["rows"])
        yield path, content["verdicts"], [frame.plain(vars(verdict)) for verdict in again]


def test_kept_verdicts_follow_from_kept_rows(answers):
    checked = 0
    for results in (page.RESULTS, answers):
        for path, kept, again in recomputed(results):
            assert kept == again, path
            checked += len(kept)
    assert checked >= 10


def test_the_page_is_made_of_what_is_kept(answers):
    (answers / "text.md").write_text(
        "# intro\nBegins {toy 0 value best_of_n}.\n# confidence\nIt is {toy 1}, p {toy 1 p}.\n"
        "# open\nMuch.\n"
    )
    text = page.page(answers, answers.parent.parent / "docs/findings.md")
    kept = json.loads((answers / "toy/confidence.json").read_text())["verdicts"]
    first = json.loads((answers / "toy/best_of_n.json").read_text())["verdicts"][0]
    assert f"Begins {page.shown(first['value'])}." in text
    assert f"It is {page.interval(kept[1])}, p {page.shown(kept[1]['p'])}." in text
    assert text.endswith("## What remains open\n\nMuch.\n")
    assert "](../results/findings/toy/confidence.png)" in text
    rows = re.findall(r"^\| \[.*$", text, flags=re.MULTILINE)
    assert sum(kept[0]["claim"] in row for row in rows) == 1
    (answers / "text.md").write_text("# confidence\n{toy 99}\n")
    with pytest.raises(KeyError, match="toy has"):
        page.page(answers, answers.parent.parent / "docs/findings.md")
    (answers / "text.md").unlink()


def test_the_committed_page_is_the_one_that_would_be_made():
    assert page.PAGE.read_text() == page.page()


def test_the_readme_has_the_page_s_headline():
    answer = json.loads((page.RESULTS / "anagram/representation.json").read_text())
    first = answer["verdicts"][0]
    value, low, high = (round(100 * first[key]) for key in ("value", "low", "high"))
    readme = (page.HERE.parent / "README.md").read_text()
    assert f"{value} % ({low} to {high})" in readme and first["seeds"] == 12


def test_words_hold_no_figure_of_their_own():
    """Of the results' words: what is counted is a field. Names and 95 % are none."""
    for section, text in page.texts(page.RESULTS / "text.md").items():
        bare = re.sub(r"\{[^}]*\}|95 %|stories260k|SmolLM2-135M\S*|\[[^]]*\]\([^)]*\)", "", text)
        assert not re.search(r"\d", bare), section


def test_holm_takes_rulings_back():
    verdict = lambda p, ruling: {"p": p, "ruling": ruling, "claim": "c", "value": 1.0}
    found = {
        "m": {
            "confidence": {"verdicts": [verdict(0.04, "supported"), verdict(0.001, "supported")]},
            "best_of_n": {"verdicts": [verdict(0.5, "not supported"), verdict(None, "supported")]},
        }
    }
    one, two, three, four = (
        v for script in page.raised(found)["m"].values() for v in script["verdicts"]
    )
    assert (one["holm"], one["ruling"]) == (0.08, "undecided")
    assert (two["holm"], two["ruling"]) == (0.003, "supported")
    # It rests on the interval, not on the p; and where there is no test, there is nothing to raise.
    assert three["ruling"] == "not supported" and "holm" not in four
