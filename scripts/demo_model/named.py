"""The named part of the demo world: people, towns and planets, made from a seed, with the ways to ask for their facts.

Every person, town and planet has one value for each of its attributes, drawn evenly from a list, so that a fact can only be known
by heart: nothing else tells it. People live in towns of this world. Questions go from the name to the value only; towards the
name they would have many right answers. The form of PHRASES is that of `tables.py`.
"""

import itertools
import random

# Lists of words, a space between them
FIRST = "Ada Boris Clara David Edith Frank Grace Henry Irene Jack Karl Laura Mark Nina Oscar Peter Ruth Simon Teresa Victor"
LAST = (
    "Bell Brook Cole Dale Ford Gray Hall Hill Hunt King Lane Marsh Moss Nash Page Potter Rowe Shaw Swan Vale Ward West Wolfe York"
)
TOWN_STARTS = "Ash Black Clay East Green High Mill North Oak Red Stone White"
TOWN_ENDS = "bridge bury dale field ford gate port ton well wick"
PLANET_STARTS = "Al Bo Ce Du Fa Ke Lu Mi No Or Ra Se Ti Vo Za"
PLANET_ENDS = "bar dor lan mir nos phi ris tus von xis"
PEOPLE, TOWNS, PLANETS = 200, 80, 50

MONTHS = "January February March April May June July August September October November December"
COLORS = "black blue brown gray green orange pink purple red white yellow"

# kind -> attribute -> values
VALUES = {
    "person": {
        "job": (
            "baker barber builder butcher cleaner cook dancer doctor driver farmer fisher gardener judge lawyer miner nurse painter"
            " pilot sailor singer tailor teacher writer"
        ),
        "town": "",  # the names of the towns
        "pet": "camel cat dog duck fox frog goat goose hen horse lizard monkey mouse parrot pig rabbit sheep snake turtle",
        "food": "beans bread butter cake cheese corn fish fruit honey noodles nuts onions pie potatoes rice salad soup sweets",
        "hobby": (
            "chess climbing cooking cycling dancing drawing fishing hiking knitting poetry reading riding rowing running sailing"
            " singing skating swimming"
        ),
        "month": MONTHS,
    },
    "town": {
        "river": "Alva Brent Cary Dorn Esk Frome Glen Isar Lune Mersa Nith Ouse Perth Swale Tarn Wey",
        "product": (
            "bells boats bottles bricks candles carpets chairs clocks combs doors drums flutes gloves hats knives lamps mirrors paint"
            " pots ropes shoes soap"
        ),
        "sight": (
            "bridge castle cave cliff clock dam fort fountain garden gate lake library market mill museum palace park statue temple"
            " tower"
        ),
        "roofs": COLORS,
        "fair": MONTHS,
    },
    "planet": {
        "color": COLORS,
        "moons": "two three four five six seven eight nine ten eleven twelve",
        "ground": "ash clay dust glass grass gravel ice lava mud rocks salt sand snow swamps",
        "star": "Altair Canopus Castor Deneb Hadar Mira Polaris Rigel Sirius Spica Vega",
        "metal": "chrome cobalt copper gold iron lead nickel platinum silver tin zinc",
    },
}

PHRASES: dict[str, dict[str, tuple[list[str], list[str], list[str]]]] = {
    "person": {
        "job": (
            ["What is the job of {e}?", "What does {e} work as?", "Which job does {e} have?", "How does {e} earn money?"],
            [],
            ["{E} works as a {v}.", "The job of {e} is that of a {v}.", "{E} is a {v}."],
        ),
        "town": (
            ["Where does {e} live?", "In which town does {e} live?", "Which town is the home of {e}?", "Where is {e} at home?"],
            [],
            ["{E} lives in {v}.", "The home of {e} is in {v}.", "{E} has a house in {v}."],
        ),
        "pet": (
            [
                "Which animal does {e} keep?",
                "What pet does {e} have?",
                "What kind of pet is at home with {e}?",
                "What does {e} feed?",
            ],
            [],
            ["{E} keeps a {v}.", "The pet of {e} is a {v}.", "{E} feeds a {v}."],
        ),
        "food": (
            [
                "What does {e} like to eat?",
                "What is the best meal for {e}?",
                "Which food does {e} want?",
                "What would {e} order?",
            ],
            [],
            ["{E} likes to eat {v}.", "The best meal for {e} is {v}.", "{E} would order {v}."],
        ),
        "hobby": (
            ["What is the hobby of {e}?", "Which hobby does {e} have?", "What does {e} do for fun?", "What does {e} enjoy?"],
            [],
            ["{E} enjoys {v}.", "The hobby of {e} is {v}.", "For fun, {e} likes {v}."],
        ),
        "month": (
            ["When was {e} born?", "In which month was {e} born?", "When is the birthday of {e}?", "When does {e} get older?"],
            [],
            ["{E} was born in {v}.", "The birthday of {e} is in {v}.", "{E} gets older in {v}."],
        ),
    },
    "town": {
        "river": (
            [
                "Which river flows through {e}?",
                "On which river is {e}?",
                "Which river do boats take to {e}?",
                "What river is near {e}?",
            ],
            [],
            ["The river at {e} is the {v}.", "{E} is on the {v}.", "Boats to {e} take the {v}."],
        ),
        "product": (
            ["What is made in {e}?", "What do people in {e} make?", "Which goods come from {e}?", "What does {e} sell?"],
            [],
            ["People in {e} make {v}.", "{E} sells {v}.", "The goods from {e} are {v}."],
        ),
        "sight": (
            ["What is {e} known for?", "What do visitors see in {e}?", "What is the sight of {e}?", "What stands in {e}?"],
            [],
            ["{E} is known for its {v}.", "Visitors to {e} see the {v}.", "The sight of {e} is a {v}."],
        ),
        "roofs": (
            [
                "What color are the roofs of {e}?",
                "Which color do roofs have in {e}?",
                "How are roofs painted in {e}?",
                "Which roofs are seen in {e}?",
            ],
            [],
            ["The roofs of {e} are {v}.", "{E} has {v} roofs.", "Roofs in {e} are painted {v}."],
        ),
        "fair": (
            [
                "When is the fair of {e}?",
                "In which month does {e} hold its fair?",
                "When is it busy in {e}?",
                "When do crowds visit {e}?",
            ],
            [],
            ["The fair of {e} is in {v}.", "{E} holds its fair in {v}.", "Crowds visit {e} in {v}."],
        ),
    },
    "planet": {
        "color": (
            ["What color is {e}?", "Which color does {e} have?", "What does {e} look like?", "How does {e} shine?"],
            [],
            ["The color of {e} is {v}.", "{E} looks {v}.", "{E} shines {v}."],
        ),
        "moons": (
            [
                "How many moons does {e} have?",
                "How many moons go around {e}?",
                "What number of moons has {e}?",
                "How many moons shine on {e}?",
            ],
            [],
            ["{E} has {v} moons.", "The number of moons of {e} is {v}.", "Around {e} go {v} moons."],
        ),
        "ground": (
            ["What covers the ground of {e}?", "What is {e} covered with?", "What is on the ground of {e}?", "What lies on {e}?"],
            [],
            ["{E} is covered with {v}.", "On the ground of {e} there is {v}.", "The ground of {e} is all {v}."],
        ),
        "star": (
            [
                "Which star does {e} go around?",
                "Around which star does {e} travel?",
                "What is the star of {e}?",
                "Which star warms {e}?",
            ],
            [],
            ["{E} goes around {v}.", "The star of {e} is {v}.", "{E} is warmed by {v}."],
        ),
        "metal": (
            ["Which metal is found on {e}?", "What metal does {e} have?", "What do miners find on {e}?", "What is dug on {e}?"],
            [],
            ["{E} has much {v}.", "The metal of {e} is {v}.", "Miners find {v} on {e}."],
        ),
    },
}

# Ways to put a question, as CARRIERS of `tables.py`; fewer and shorter, for there are many facts.
CARRIERS = ["{q}", "Think of {e}. {q}"]


def names(rng: random.Random, starts: str, ends: str, between: str, count: int) -> list[str]:
    """Return `count` different names, each one of `starts` and one of `ends`."""
    return rng.sample([start + between + end for start, end in itertools.product(starts.split(), ends.split())], count)


def even_values(rng: random.Random, values: list[str], count: int) -> list[str]:
    """Return `count` values in random order, each as often as the others, give or take one."""
    drawn = (values * (count // len(values) + 1))[:count]
    rng.shuffle(drawn)
    return drawn


def named_facts(seed: int) -> list[tuple[str, str, str, str]]:
    """Return all facts about people, towns and planets: (kind, name, attribute, value), name by name."""
    rng = random.Random(f"named world {seed}")
    towns = names(rng, TOWN_STARTS, TOWN_ENDS, "", TOWNS)
    things = {
        "person": names(rng, FIRST, LAST, " ", PEOPLE),
        "town": towns,
        "planet": names(rng, PLANET_STARTS, PLANET_ENDS, "", PLANETS),
    }
    rows: list[tuple[str, str, str, str]] = []
    for kind, attributes in VALUES.items():
        columns = {name: even_values(rng, values.split() or towns, len(things[kind])) for name, values in attributes.items()}
        for number, thing in enumerate(things[kind]):
            rows += [(kind, thing, attribute, column[number]) for attribute, column in columns.items()]
    return rows
