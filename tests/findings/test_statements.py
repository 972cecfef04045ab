"""Rules of thumb, verdicts on plans and sentences against planted truth: what holds, fails, loses or cannot be told."""

import numpy as np
import pytest

from bitatlas.findings.conclude import (
    AttentionEvidence,
    Conclusions,
    DamageEvidence,
    Evidence,
    PlanEvidence,
    TaskEvidence,
    conclude,
)
from bitatlas.findings.correlations import layer_correlations
from bitatlas.findings.folk import folk_findings, marking_rules, math_needs_more
from bitatlas.findings.shares import shares_of
from bitatlas.plan.judge import verdict_on_plan
from bitatlas.records import (
    Budget,
    Finding,
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
ROUGH = np.array([0.02, 0.05, 0.01, 0.06, 0.03, 0.07, 0.015, 0.04, 0.025, 0.055, 0.012, 0.045])  # neighbours unlike each other


def folk(first: np.ndarray, tolerance: float) -> dict[str, Finding]:
    shares = shares_of(quadratic_rows(first, np.zeros((len(first),) * 2), 48))
    return {finding.claim: finding for finding in folk_findings(shares, tolerance)}


def verdicts(first: np.ndarray, tolerance: float) -> dict[str, str]:
    return {claim: finding.verdict for claim, finding in folk(first, tolerance).items()}


def marked(first: np.ndarray, **measures: np.ndarray) -> dict[str, str]:
    shares = shares_of(quadratic_rows(first, np.zeros((len(first),) * 2), 48))
    named = {name.replace("_", " "): values for name, values in measures.items()}
    return {one.claim: one.verdict for one in marking_rules(layer_correlations(named, shares), shares)}


def test_rules_hold_where_they_are_planted():
    assert verdicts(UP, GENEROUS) == {
        "early layers are safe": "holds",
        "late layers are critical": "holds",
        "the first and last layers matter most": "does not hold",
    }
    assert verdicts(ENDS_UP, GENEROUS)["the first and last layers matter most"] == "holds"
    assert marked(ROUGH, sparsity=-ROUGH, attention_entropy=ROUGH) == {
        "sparse layers are safe": "holds",
        "low attention entropy marks critical layers": "does not hold",
        "specialized heads mark critical layers": "inconclusive",
    }


def test_rules_fail_where_the_opposite_is_planted():
    told = verdicts(UP[::-1], GENEROUS)
    assert told["early layers are safe"] == "does not hold"
    assert told["late layers are critical"] == "does not hold"
    assert marked(ROUGH, sparsity=ROUGH)["sparse layers are safe"] == "does not hold"


def test_rules_are_inconclusive_on_equal_layers():
    assert set(verdicts(np.full(9, 0.02), GENEROUS).values()) == {"inconclusive"}
    assert set(marked(np.full(9, 0.02), sparsity=np.arange(9.0) % 4).values()) == {"inconclusive"}


def test_two_trends_are_no_rule():
    """Sparsity and damage both rise with depth: any two slow curves do, so nothing is said of one through the other."""
    assert marked(UP, sparsity=-UP)["sparse layers are safe"] == "inconclusive"


def test_early_layers_that_are_less_critical_but_harmful_are_not_safe():
    damage = UP[:4].sum()
    for tolerance, verdict in ((damage * 2, "holds"), (damage, "inconclusive"), (damage / 2, "does not hold")):
        assert verdicts(UP, tolerance)["early layers are safe"] == verdict


def test_what_one_layer_does_is_no_rule_about_many():
    """All layers are alike but one: the halves differ, and without that layer they do not."""
    alone = np.array([0.02] * 8)
    alone[7] = 0.2
    told = folk(alone, GENEROUS)
    for claim in ("early layers are safe", "late layers are critical"):
        assert told[claim].verdict == "inconclusive"
        assert "It rests on layer 7 alone: without it the difference is" in told[claim].text
    assert told["early layers are safe"].evidence.ci95[1] < 0
    steady = folk(UP, GENEROUS)
    assert "That holds without any one of the layers." in steady["early layers are safe"].text
    first = folk(alone[::-1], 0.1)["early layers are safe"]  # harmful all the same, and by one layer
    assert first.verdict == "does not hold"
    assert "most of it layer 0's (without it" in first.text


def test_the_extremes_are_compared_with_the_greatest_of_the_others():
    """Both ends are above the mean of those between; one of these is above both ends."""
    told = folk(np.array([0.05, 0.01, 0.01, 0.07, 0.01, 0.01, 0.01, 0.05]), GENEROUS)["the first and last layers matter most"]
    assert told.verdict == "does not hold"
    assert "the greatest between" in told.text
    assert "(layer 3)" in told.text
    tied = folk(np.array([0.05, 0.01, 0.01, 0.05, 0.01, 0.01, 0.01, 0.05]), GENEROUS)["the first and last layers matter most"]
    assert tied.verdict == "inconclusive"
    assert tied.evidence.ci95[0] < 0 < tied.evidence.ci95[1]


def test_one_critical_end_is_not_both_ends():
    told = verdicts(np.array([0.06, *[0.02] * 7, 0.01]), GENEROUS)
    assert told["the first and last layers matter most"] == "does not hold"


def test_models_too_small_for_a_rule_say_so():
    told = folk(np.array([0.01, 0.05]), 0.05)
    assert told["early layers are safe"].text == "Not tested: the model has 2 layers, the test needs 4."
    assert told["late layers are critical"].text == "Not tested: the model has 2 layers, the test needs 6."
    assert told["the first and last layers matter most"].text.startswith("Not tested")


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
    drops = {  # of what is known beyond guessing: chance is 0.1 here
        task: 100 * (right["uniform:int4_g64"].mean() - right["uniform:int2_g64"].mean()) / 0.9
        for task, right in outcomes.items()
    }
    assert told.evidence.mean == pytest.approx(drops["svamp"] - (drops["arc"] + drops["arc2"]) / 2)
    assert (told.topic, told.claim, told.verdict) == ("tasks", "math needs higher precision", verdict)
    assert ("would not have shown" in told.text) == (verdict == "inconclusive")
    assert "This compares svamp, arc and arc2, no more" in told.text
    assert "the form of the answer may be what differs" in told.text


def test_a_floor_under_one_task_is_no_difference():
    """Both tasks lose half of what is known; a half of the choices are right by guessing, so fewer points are lost there."""
    n = 4000
    known, kept, guessed = np.arange(n) % 8 < 6, np.arange(n) % 8 < 3, np.arange(n) // 8 % 2 == 0
    outcomes = {
        "svamp": {"uniform:int4_g64": known, "uniform:int2_g64": kept},
        "arc": {"uniform:int4_g64": known | guessed, "uniform:int2_g64": kept | guessed},
    }
    scores = [
        TaskScore(task, name, int(right.sum()), n, {"svamp": 0.0, "arc": 0.5}[task], (0.0, 1.0), True)
        for task, by_name in outcomes.items()
        for name, right in by_name.items()
    ]
    told = math_needs_more(outcomes, {"svamp"}, scores, "uniform:int4_g64", "uniform:int2_g64")
    assert told.evidence.mean == pytest.approx(0.0, abs=1e-9)
    assert told.verdict == "inconclusive"
    assert "lose 37.5 points and questions (arc) 37.5" in told.text


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
    assert [other.name for other in told.baselines] == list(rows)
    name, damage, difference, _, _ = told.baselines[0]
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
    attention = [*attention_of(9), *attention_of(9, "uniform:int4_g64"), *attention_of(9, "uniform:int2_g64")]
    evidence = Evidence(
        damage=DamageEvidence(quadratic_rows(UP, NO_PAIRS, 40), modules),
        weights=profiles(9, -UP + 0.1),
        attention=AttentionEvidence(attention),
        plan=PlanEvidence(plan_of(modules, False)),
        tasks=TaskEvidence(scored(outcomes), [pair], outcomes, {"svamp"}),
    )
    return conclude(evidence, 0.05, seed)


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
    told = conclude(Evidence(DamageEvidence(quadratic_rows(UP, NO_PAIRS, 40))), 0.05)
    assert {finding.topic for finding in told.findings} == {"layers", "zones", "folk"}
