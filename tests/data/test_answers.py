"""What number a written answer states: a table, since a rule is what it reads."""

import pytest

from bitatlas.data.numbers import plain_number, read_number, same_answer

SHORT = {
    # alone, with a unit, with words around it
    "17": 17, "17.": 17, "17 pens": 17, "**17**": 17, "so 17.": 17, "He has 17 pens left.": 17, "The answer is 17.": 17,
    "#### 17": 17, "\\boxed{17}": 17, "x = 17": 17, "Answer: 17": 17, "seventeen": 17, "He has seventeen left": 17,
    # followed by something else
    "17 (26 - 9)": 17, "17, not 26": 17, "17 or 18": 17, "17 apples and 3 pears": 17, "17 more than 9": 17, "17 - all of them": 17,
    "It is 17, not 26.": 17, "Tom has 17 pens left (26 - 9).": 17, "He has 17 left, because 9 + 17 = 26": 17, "5 + 3 = 8 (not 9)": 8,
    "He had 26 pens and lost 9, so he has 17 left.": 17, "The answer is 17, since 26 - 9 = 17 and 3 + 4 = 7.": 17,
    # equations
    "26 - 9 = 17": 17, "26 − 9 = 17": 17, "76-25=51": 51, "26-9=17 apples in 2 boxes": 17, "17 = 26 - 9": 17, "(26 - 9) = 17": 17,
    "26 pens - 9 pens = 17 pens": 17, "26 - 9 = 17. 17 + 3 = 20.": 20, "12 / 4 = 3": 3, "8 ÷ 2 = 4 eggs": 4, "26 minus 9 is 17": 17,
    "26 minus nine equals 17": 17, "Twenty-six minus nine is seventeen": 17, "26 + -9 = 17": 17, "1 200 = 1000 + 200": 1200,
    # how numbers are written
    "-5": -5, "−5": -5, "= -5": -5, "3/4": 0.75, "-3/4": -0.75, "1/2 cup": 0.5, "2 1/2": 2.5, "1e3": 1000, "1.5e-5": 1.5e-5,
    "1,200": 1200, "1 200": 1200, "1\u202f200": 1200, "1.200": 1.2, "1.200.000": 1.2e6, "1,200,000 and 3": 1.2e6, "$17.00": 17,
    "-$5": -5, "€5": 5, "17%": 17, "17.5.": 17.5, ".5": 0.5,
    # no answer: nothing, a calculation without its result, what is no number
    "": None, "no idea": None, "26 - 9": None, "17-18": None, "26 - 9 = ?": None, "1e400": None, "3/0": None,
}  # fmt: skip


@pytest.mark.parametrize("output", SHORT)
def test_short_answers(output):
    assert read_number("problem", output) == SHORT[output]
    assert read_number("problem", f"\n {output}\n99 bottles") == (
        99 if output == "" else SHORT[output]
    )  # the first line that is not empty


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("26 - 9 = 17\n17 + 3 = 20\n#### 20", 20),
        ("#### 26-9=17", 17),
        ("#### 17 (26 - 9)\nQ", 17),
        ("26 - 9 = 17\nThe answer is 17.\nThat took 3 steps.", 17),
        ("26 - 9 = <<26-9=17>>17", 17),
        ("He has 17 left, not 26.\nWell done!", 17),
        ("He had 26 and 3, now 17.", 17),
        ("26 - 9 = 17\n17 - 9", 17),
    ],
)
def test_worked_solutions(output, number):
    assert read_number("worked", output) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e16, "10000000000000000"), (0.00001, "1e-05"), ("1e16", "10000000000000000"), ("1E-5", "1e-05"), (-3, "-3"), ("−3", "-3"), ("3/4", "0.75"),
        ("2,125", "2125"), ("1 000", "1000"), ("$17", "17"), (2.5, "2.5"), (10**30, str(10**30 + 19884624838656)),
    ],
)  # fmt: skip
def test_right_answers_are_numbers(value, text):
    assert plain_number(value) == text
    assert float(plain_number(plain_number(value))) == float(text)


@pytest.mark.parametrize("value", ["", "many", "1 or 2", "nan", "1e999", float("inf"), True, None, [1, 2]])
def test_what_is_no_single_number(value):
    with pytest.raises(ValueError, match="is not a number"):
        plain_number(value)


def test_equal_answers():
    assert same_answer(0.333333, 1 / 3)
    assert not same_answer(0.0, 1e-5)
    assert not same_answer(1e-5, 0.0)
    assert not same_answer(1e7 + 1, 1e7)
    assert not same_answer(None, 0.0)
    assert same_answer(1e16, 1e16)
