"""Items against their sources: one form for every task, and one clear line for each kind of damaged file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitatlas.data.numbers import numbers_in, plain_number, read_number
from bitatlas.data.tasks import TASKS, chance_level, check_task_names, items_sha256, load_items, split_items, task_text
from bitatlas.errors import UserError
from task_files import PROBLEMS, QUESTIONS, needs_demo, needs_shared, write_task_data
from tiny import SHARED


@pytest.fixture
def task_data(tmp_path):
    return write_task_data(tmp_path)


# --- names and items ---------------------------------------------------------------------------------------------------


def test_task_names():
    assert check_task_names(["svamp", " arc_easy", "svamp", ""]) == ["svamp", "arc_easy"]
    assert check_task_names(["none"]) == []
    assert check_task_names([]) == []
    with pytest.raises(UserError, match=r"unknown task 'arc_esy'; nearest is 'arc_easy' \(valid: demo_problems"):
        check_task_names(["arc_esy"])
    with pytest.raises(UserError, match="'none' stands alone"):
        check_task_names(["svamp", "none"])


def test_items_take_one_form(task_data):
    questions = {item["id"]: item for item in load_items("arc_easy", task_data, None, seed=0)}
    assert questions["three"]["gold"] == 1
    assert questions["numbered"]["choices"][questions["numbered"]["gold"]] == "water"
    assert [questions[name]["chance"] for name in ("three", "numbered", "five")] == [1 / 3, 1 / 4, 1 / 5]
    problems = {item["id"]: item for item in load_items("svamp", task_data, None, seed=0)}
    assert problems["p1"] == {
        "id": "p1",
        "question": "Tom had 26 pens. He lost 9. How many are left?",
        "answer": "17",
        "worked": "26 - 9 = 17",
        "chance": 0.25,
    }
    (worked,) = load_items("gsm8k", task_data, None, seed=0)
    assert worked["answer"] == "2000"


def test_hub_form_of_choices_gives_the_same_items(task_data):
    flat = load_items("arc_easy", task_data, None, seed=0)
    hub = [
        {**record, "choices": {key: [choice[key] for choice in record["choices"]] for key in ("label", "text")}}
        for record in QUESTIONS
    ]
    (task_data / "ARC-Easy-test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in hub))
    assert load_items("arc_easy", task_data, None, seed=0) == flat


def test_a_line_ends_at_a_line_end_alone(task_data):
    record = {"question": "One.\u2028How many?", "answer": "#### 1"}
    (task_data / "gsm8k_test.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (item,) = load_items("gsm8k", task_data, None, seed=0)
    assert item["question"] == record["question"]


def test_text_of_a_task(task_data):
    text = task_text("gsm8k", load_items("gsm8k", task_data, None, seed=0))
    assert text == "Question: Two hens lay 1,000 eggs each. How many?\nAnswer: 2*1000=2000\n#### 2,000\n"
    blocks = task_text("arc_easy", load_items("arc_easy", task_data, None, seed=0)).split("\n\n")
    assert len(blocks) == 3
    assert any(block.strip() == "Question: Which has three sides?\nAnswer: triangle" for block in blocks)


@needs_shared
@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "svamp", "gsm8k"])
def test_a_larger_limit_keeps_the_items_and_the_rest_is_spare(task):
    data = SHARED / "data"
    everything, nothing = split_items(task, data, None, seed=1)
    assert nothing == []
    few, spare = split_items(task, data, 20, seed=1)
    more, _ = split_items(task, data, 50, seed=1, few_shot=5)
    assert [{k: v for k, v in item.items() if k != "examples"} for item in more[:20]] == few == everything[:20]
    assert len(few) + len(spare) == len(everything)
    assert {item["id"] for item in few}.isdisjoint(item["id"] for item in spare)
    scored, examples = split_items(task, data, None, seed=1, few_shot=5)
    assert [{**item, "examples": []} for item in scored] == [{**item, "examples": []} for item in everything[:-5]]
    assert examples == spare[:5]
    assert all(item["examples"] == examples for item in scored)
    assert items_sha256(load_items(task, data, 20, seed=1)) == items_sha256(few)
    assert items_sha256(load_items(task, data, 20, seed=2)) != items_sha256(few)
    assert items_sha256(few[::-1]) != items_sha256(few)


@needs_shared
def test_chance_levels():
    def level(task):
        return chance_level(load_items(task, SHARED / "data", None, seed=0))

    easy = [json.loads(line) for line in (SHARED / "data" / "ARC-Easy-test.jsonl").read_text().splitlines()]
    assert level("arc_easy") == pytest.approx(sum(1 / len(record["choices"]) for record in easy) / len(easy), abs=1e-12)
    problems = [record["Answer"] for record in json.loads((SHARED / "data" / "SVAMP.json").read_text())]
    assert level("svamp") == pytest.approx(max(map(problems.count, set(problems))) / len(problems), abs=1e-12)
    assert level("svamp") == pytest.approx(0.077)
    assert 0.01 < level("gsm8k") < 0.05


@needs_demo
def test_demo_tasks_need_no_folder():
    for task in ("demo_problems", "demo_questions"):
        assert len(load_items(task, None, None, seed=0)) == 300
    assert all(" = " in item["worked"] for item in load_items("demo_problems", None, 20, seed=0))


def texts(*choices: str | None) -> list[dict]:
    return [{"label": label, "text": choice} for label, choice in zip("ABC", choices, strict=True)]


@pytest.mark.parametrize(
    ("task", "text", "told"),
    [
        ("svamp", "[{", "not valid JSON"),
        ("svamp", "[]", "has no items"),
        ("svamp", json.dumps([{"ID": "a", "Body": "b", "Question": "c"}]), "item 1 has no field 'Answer'; svamp wants ID, Body"),
        (
            "svamp",
            json.dumps([PROBLEMS[0], {**PROBLEMS[1], "Answer": "many"}]),
            "item 2 is not as expected .*'many' is not a number",
        ),
        ("svamp", json.dumps([PROBLEMS[0], PROBLEMS[0]]), "two items have the id 'p1'"),
        ("arc_easy", json.dumps({**QUESTIONS[0], "answerKey": "E"}), "answerKey 'E' is none of the labels"),
        ("arc_easy", json.dumps({**QUESTIONS[0], "choices": []}), "fewer than two choices"),
        ("gsm8k", json.dumps({"question": "q", "answer": "17"}), "no #### in the answer"),
        ("gsm8k", json.dumps({"question": None, "answer": "#### 17"}), "question is null, not a text"),
        ("gsm8k", json.dumps({"question": " ", "answer": "#### 17"}), "question is empty"),
        ("gsm8k", json.dumps({"question": "q", "answer": "#### 1" + "0" * 400}), "is not a number"),
        ("gsm8k", json.dumps({"question": "half \ud800", "answer": "#### 17"}), "item 1 is not as expected .*surrogates"),
        ("arc_easy", json.dumps({**QUESTIONS[0], "choices": texts("square", "", "circle")}), "choice is empty"),
        ("arc_easy", json.dumps({**QUESTIONS[0], "choices": texts("square", None, "circle")}), "choice is null, not a text"),
        ("arc_easy", json.dumps({**QUESTIONS[0], "choices": texts("square", "\udc00", "circle")}), "surrogates"),
        ("arc_easy", "[" * 100_000, "not valid JSON"),
        ("svamp", "[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_files_are_told_in_one_line(task_data, task, text, told):
    (task_data / TASKS[task].file).write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        load_items(task, task_data, None, seed=0)
    assert "\n" not in str(raised.value)
    assert TASKS[task].file in str(raised.value)


def test_impossible_requests(task_data):
    with pytest.raises(UserError, match=r"ARC-Challenge-test.jsonl: no such file"):
        load_items("arc_challenge", task_data, None, seed=0)
    with pytest.raises(UserError, match="--limit 0"):
        load_items("svamp", task_data, 0, seed=0)
    with pytest.raises(UserError, match="--few-shot 4: svamp has 4 items"):
        load_items("svamp", task_data, None, seed=0, few_shot=4)
    with pytest.raises(UserError, match="--few-shot -1"):
        load_items("svamp", task_data, None, seed=0, few_shot=-1)
    assert len(load_items("svamp", task_data, 100, seed=0)) == 4


# --- numbers in texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("26 - 9 = 17", [26, 9, 17]),
        ("76-25", [76, 25]),
        ("(3)-2", [3, 2]),
        ("it is -3.", [-3]),
        ("= −3", [-3]),
        ("$1,234.50, then 1,2", [1234.5, 1, 2]),
        ("1,23", [1, 23]),
        (".5 and 0.5", [0.5, 0.5]),
        ("x2 is no sign-7", [2, 7]),
        ("none", []),
    ],
)
def test_numbers_in_text(text, numbers):
    assert numbers_in(text) == numbers


@given(st.lists(st.integers(-(10**9), 10**9)))
def test_numbers_are_read_back(numbers):
    assert numbers_in(" and ".join(map(str, numbers))) == numbers
    assert numbers_in(" and ".join(f"{number:,}" for number in numbers)) == numbers


@given(st.integers(-(10**6), 10**6), st.integers(0, 99))
def test_plain_numbers(whole, hundredths):
    assert plain_number(float(whole)) == plain_number(f"{whole:,}") == str(whole)
    value = abs(whole) + hundredths / 100
    assert float(plain_number(value)) == value


@pytest.mark.parametrize(
    ("form", "output", "number"),
    [
        ("problem", " 26 - 9 = 17\n", 17),
        ("problem", "\n 17 pens\nIn all 99", 17),
        ("problem", " many\n12", None),
        ("problem", "", None),
        ("worked", " 3*4=<<3*4=12>>12\nso 12\n#### 12", 12),
        ("worked", "#### 1,200 dollars for 2", 1200),
        ("worked", " 3 and then 5.", 5),
        ("worked", "so 4\n#### ", 4),
    ],
)
def test_the_answer_is_read_from_the_text(form, output, number):
    assert read_number(form, output) == number
