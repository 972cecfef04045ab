"""Rules of thumb, verdicts on plans and sentences against planted truth: what holds, fails, loses or cannot be told."""

import numpy as np
import pytest

from bitatlas.findings import (
    Conclusions,
    TaskEvidence,
    conclude,
    folk_findings,
    math_needs_more,
    shares_of,
    verdict_on_plan,
)
from bitatlas.records import (
    Budget,
    Measured,
    Module,
    Plan,
    PlanDamage,
    PlanModel,
    Size,
    TaskPair,
    TaskScore,
)
from games import LOW, attention_of, profiles, quadratic_rows

GENEROUS = 100.0  # nats/token: nothing is unsafe for its damage

# --- folk rules --------------------------------------------------------------------------------------------------------

NO_PAIRS = np.zeros((9, 9))
UP = np.linspace(0.005, 0.045, 9)  # damage rises with depth
ENDS_UP = np.array([0.06, *[0.01] * 7, 0.06])


def folk(first: np.ndarray, tolerance: float, sparsity: np.ndarray | None = None) -> dict[str, str]:
    shares = shares_of(quadratic_rows(first, NO_PAIRS, 48))
    return {finding.claim: finding.verdict for finding in folk_findings(shares, tolerance, sparsity)}


def test_rules_hold_where_they_are_planted():
    told = folk(UP, GENEROUS, sparsity=-UP)
    assert told == {
        "early layers are safe": "holds",
        "late layers are critical": "holds",
        "sparse layers are safe": "holds",
        "the first and last layers matter most": "does not hold",
    }
    assert folk(ENDS_UP, GENEROUS)["the first and last layers matter most"] == "holds"


def test_rules_fail_where_the_opposite_is_planted():
    told = folk(UP[::-1], GENEROUS, sparsity=UP[::-1])
    assert told["early layers are safe"] == "does not hold"
    assert told["late layers are critical"] == "does not hold"
    assert told["sparse layers are safe"] == "does not hold"


def test_rules_are_inconclusive_on_equal_layers():
    told = folk(np.full(9, 0.02), GENEROUS, sparsity=np.arange(9.0))
    assert set(told.values()) == {"inconclusive"}


def test_early_layers_that_are_less_critical_but_harmful_are_not_safe():
    damage = UP[:4].sum()
    assert folk(UP, damage * 2)["early layers are safe"] == "holds"
    assert folk(UP, damage)["early layers are safe"] == "inconclusive"
    assert folk(UP, damage / 2)["early layers are safe"] == "does not hold"


def test_four_layers_in_perfect_order_can_be_chance():
    steps = np.array([0.01, 0.02, 0.03, 0.04])
    (told,) = (
        one
        for one in folk_findings(shares_of(quadratic_rows(steps, np.zeros((4, 4)), 48)), GENEROUS, -steps)
        if "sparse" in one.claim
    )
    assert told.evidence.ci95[1] < 0
    assert (told.p_value, told.verdict) == (2 / 24, "inconclusive")


def test_one_critical_end_is_not_both_ends():
    told = folk(np.array([0.06, *[0.02] * 7, 0.01]), GENEROUS)
    assert told["the first and last layers matter most"] == "does not hold"


def test_models_too_small_for_a_rule_say_so():
    told = folk_findings(shares_of(quadratic_rows(np.array([0.01, 0.05]), np.zeros((2, 2)), 30)), 0.05, np.array([0.1, 0.2]))
    texts = {finding.claim: finding.text for finding in told}
    assert texts["sparse layers are safe"] == "Not tested: the model has 2 layers, the test needs 4."
    assert texts["the first and last layers matter most"].startswith("Not tested")


def answers(n: int, high: float, low: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    right = rng.random(n) < high
    return {"uniform:int4_g64": right, "uniform:int2_g64": right & (rng.random(n) < low / high)}


def scored(outcomes: dict[str, dict[str, np.ndarray]], at_chance: tuple[str, ...] = ()) -> list[TaskScore]:
    return [
        TaskScore(task, precision, int(right.sum()), len(right), 0.1, (0.0, 1.0), task not in at_chance)
        for task, by_precision in outcomes.items()
        for precision, right in by_precision.items()
    ]


@pytest.mark.parametrize(
    ("math", "questions", "verdict"),
    [((0.8, 0.3), (0.8, 0.7), "holds"), ((0.8, 0.7), (0.8, 0.3), "does not hold"), ((0.8, 0.6), (0.8, 0.6), "inconclusive")],
)
def test_math_needs_more_is_an_interaction(math, questions, verdict):
    outcomes = {
        "svamp": answers(300, *math, seed=1),
        "arc": answers(300, *questions, seed=2),
        "arc2": answers(100, *questions, seed=3),
    }
    told = math_needs_more(outcomes, {"svamp"}, scored(outcomes), "uniform:int4_g64", "uniform:int2_g64")
    drops = {
        task: 100 * (right["uniform:int4_g64"].mean() - right["uniform:int2_g64"].mean()) for task, right in outcomes.items()
    }
    assert told.evidence.mean == pytest.approx(drops["svamp"] - (drops["arc"] + drops["arc2"]) / 2)
    assert (told.topic, told.claim, told.verdict) == ("tasks", "math needs higher precision", verdict)
    assert ("would not have shown" in told.text) == (verdict == "inconclusive")


def test_math_is_not_tested_where_a_kind_is_missing_or_at_chance():
    outcomes = {"svamp": answers(50, 0.8, 0.3, 1), "arc": answers(50, 0.8, 0.7, 2)}
    bases = ("uniform:int4_g64", "uniform:int2_g64")
    without = math_needs_more({"arc": outcomes["arc"]}, {"svamp"}, scored(outcomes), *bases)
    guessing = math_needs_more(outcomes, {"svamp"}, scored(outcomes, at_chance=("svamp",)), *bases)
    for told in (without, guessing):
        assert told.verdict == "inconclusive"
        assert told.text == "Not tested: no task of word problems was scored above chance at uniform:int4_g64."


# --- the plan ----------------------------------------------------------------------------------------------------------


def plan_rows(means: dict[str, float], rows: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0, 0.5, rows)
    return {name: mean * shared + rng.normal(0, 0.002, rows) for name, mean in means.items()}


def test_a_plan_that_beats_everything_is_recommended_with_its_evidence():
    rows = plan_rows({"plan": 0.2, "uniform": 0.5, "first layers high": 0.4, "random 1": 0.3, "random 2": 0.35})
    told = verdict_on_plan(rows.pop("plan"), rows)
    assert (told.recommended, told.winner) == (True, "plan")
    assert [name for name, _, _ in told.baselines] == list(rows)
    name, damage, difference = told.baselines[0]
    assert damage.mean == pytest.approx(rows[name].mean())
    assert difference.ci95[1] < 0
    assert "beats uniform" in told.text
    assert "beats 2 of 2 random plans" in told.text


@pytest.mark.parametrize("better", ["uniform", "first layers high", "last layers high", "random 7"])
def test_a_plan_is_refused_when_any_baseline_has_the_lower_mean(better):
    means = dict.fromkeys(["plan", "uniform", "first layers high", "last layers high", "random 7", "random 8"], 0.5)
    rows = plan_rows(means | {better: 0.45})
    told = verdict_on_plan(rows.pop("plan"), rows)
    assert (told.recommended, told.winner) == (False, better)
    assert told.text.startswith(f"{better}, no larger, does less damage on 40 test rows: ")


def test_a_narrow_loss_is_no_worse_shown_and_not_recommended():
    rng = np.random.default_rng(1)
    own = rng.normal(1, 0.1, 40)
    noise = rng.normal(0, 0.1, 40)
    told = verdict_on_plan(own, {"uniform": own + noise - noise.mean() - 0.001})
    assert (told.standing, told.recommended) == ("no worse shown", False)
    assert told.text.startswith("no worse shown, and no better, than uniform (plan minus uniform: ")
    assert told.text.endswith("more rows (--rows) would tell")


def test_the_smallest_of_equals_is_recommended():
    rng = np.random.default_rng(1)
    rows = {"uniform": rng.normal(1, 0.1, 40), "first layers high": rng.normal(3, 0.1, 40)}
    own = rng.normal(1, 0.1, 40)
    told = [verdict_on_plan(own, rows, sizes={"plan": size, "uniform": 1000, "first layers high": 900}) for size in (980, 995)]
    assert [(one.standing, one.recommended) for one in told] == [("no worse shown", True), ("no worse shown", False)]
    assert told[0].text.endswith("recommended as the smallest of these")


def test_better_is_better_than_each_and_worse_than_one_is_worse():
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.01, 40)
    rows = {f"random {i}": 1 + 0.1 * i + noise for i in range(1, 20)}
    assert verdict_on_plan(1 + rng.normal(0, 0.01, 40), rows).standing == "better"
    assert verdict_on_plan(1.3 + rng.normal(0, 0.01, 40), rows).standing == "worse"
    assert verdict_on_plan(1.1 + rng.normal(0, 0.01, 40), rows).standing == "no worse shown"


def test_blocks_of_rows_widen_a_verdict():
    """Ten blocks that are each one row six times over: the plan beats the baseline on all but one of them."""
    once = np.array([-0.1] * 8 + [0.02, 0.3])
    own, blocks = np.repeat(1 + once, 6), np.repeat(np.arange(10), 6).tolist()
    rows = {"uniform": np.ones(60)}
    assert verdict_on_plan(own, rows).standing == "better"
    told = verdict_on_plan(own, rows, blocks=blocks)
    assert (told.standing, told.recommended) == ("no worse shown", False)
    assert "on 60 test rows in 10 blocks" in told.text


def test_a_plan_that_is_its_baseline_is_no_rival_and_is_not_refused():
    own = np.linspace(0.1, 0.2, 10)
    told = verdict_on_plan(own, {"uniform": own.copy()})
    assert (told.recommended, told.winner) == (True, "plan")
    assert "the same plan as uniform" in told.text


# --- everything together -----------------------------------------------------------------------------------------------


def plan_of(modules: list[Module], recommended: bool | None) -> Plan:
    damage = Measured(0.2, (0.18, 0.22), "nats/token", "plan", "test", 40)
    return Plan(
        PlanModel("tiny", None, "0"), {}, "rtn", {module.name: LOW for module in modules[:5]}, Budget("code_bits", 3.0), Size(2.9, 3.4, 1, 2),
        PlanDamage(0.19, damage), [], recommended, "uniform, no larger, does less damage",
        standing="" if recommended is None else "better" if recommended else "worse",
    )  # fmt: skip


def whole(seed: int = 0) -> Conclusions:
    modules = [Module(f"m{layer}", layer, "a", (2, 2), f"m{layer}") for layer in range(9)]
    outcomes = {"svamp": answers(80, 0.8, 0.3, 1), "arc": answers(80, 0.8, 0.7, 2)}
    difference = Measured(-50.0, (-60.0, -40.0), "points", "uniform:int4_g64", "items:svamp", 80)
    pair = TaskPair(
        "svamp", "uniform:int4_g64", "uniform:int2_g64", difference, 40, 0, 1e-9, 1e-8, 8.0, 20, "falls", "falls: −50.0 points"
    )
    return conclude(
        quadratic_rows(UP, NO_PAIRS, 40), 0.05, modules=modules, weights=profiles(9, -UP + 0.1),
        attention=[*attention_of(9), *attention_of(9, "uniform:int4_g64"), *attention_of(9, "uniform:int2_g64")], plan=plan_of(modules, False),
        tested=TaskEvidence(scored(outcomes), [pair], outcomes, {"svamp"}), seed=seed,
    )  # fmt: skip


def test_conclusions_are_in_reading_order_and_repeat_exactly():
    told = whole()
    topics = [finding.topic for finding in told.findings]
    assert list(dict.fromkeys(topics)) == ["plan", "layers", "zones", "folk", "tasks", "attention"]
    assert topics == sorted(topics, key=["plan", "layers", "zones", "folk", "tasks", "attention"].index)
    assert told == whole()
    assert len(told.layers) == 9
    assert all(zone.low_share is not None for zone in told.zones)
    assert {one.measure for one in told.correlations} >= {"sparsity", "attention entropy", "depth"}


def test_every_statement_is_a_sentence_with_a_verdict():
    for finding in whole().findings:
        assert finding.claim
        assert finding.verdict
        assert finding.text[0].isupper() or finding.text[0].isdigit() or finding.text[0] == "−", finding.text
        assert finding.text.endswith("."), finding.text
        assert "nan" not in finding.text
        assert ".." not in finding.text


def test_critical_layers_refused_plans_and_pairs_are_among_the_statements():
    told = whole()
    by_claim = {finding.claim: finding for finding in told.findings}
    for layer in told.layers:
        assert (f"layer {layer.layer}" in by_claim) == (layer.verdict == "critical")
    assert by_claim["layer 8"].evidence == told.layers[8].criticality
    plan = by_claim["the plan does less damage than simple plans of its size"]
    assert (plan.verdict, plan.text) == ("does not hold", "Uniform, no larger, does less damage.")
    assert by_claim["svamp, uniform:int4_g64 to uniform:int2_g64"].text == "−50.0 points."
    assert by_claim["attention drifts more at int2_g64 than at int4_g64 in every layer"].verdict == "holds"
    assert by_claim["the damage of layers adds up but for pairs"].verdict == "holds"


def test_without_plan_tasks_and_profiles_only_layers_are_spoken_of():
    told = conclude(quadratic_rows(UP, NO_PAIRS, 40), 0.05)
    assert {finding.topic for finding in told.findings} == {"layers", "zones", "folk"}
