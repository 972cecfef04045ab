"""The demo world's contents: problem templates, and a small table of facts with the ways to ask for them.

Only data. `world.py` draws problems, questions and text from it. The shape of the problems follows SVAMP (Patel et al. 2021:
one story, several questions, numbers that are not needed), that of the questions ARC (Clark et al. 2018).
"""

NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Ivan",
    "Jane",
    "Kate",
    "Leo",
    "Mary",
    "Nora",
    "Omar",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Will",
]
OBJECTS = [
    "apples",
    "books",
    "cards",
    "cups",
    "eggs",
    "flowers",
    "hats",
    "keys",
    "lemons",
    "marbles",
    "pears",
    "pencils",
    "plates",
    "shells",
    "stamps",
    "stones",
    "toys",
]
BOXES = ["bags", "baskets", "boxes", "drawers", "jars", "rows", "trays"]
PLACES = ["farm", "garden", "kitchen", "market", "park", "school", "shop", "yard"]

# (Body, [(Question, operator), ...]). The answer is x operator y; z is a number that the question does not need.
# {n}, {m}: people; {o}, {p}: objects; {box}: a container; {place}: a place.
STORIES = [
    (
        "{n} has {x} {o} and {y} {p}. {m} has {z} {o}.",
        [("How many more {o} than {p} does {n} have?", "-"), ("How many things does {n} have in all?", "+")],
    ),
    (
        "{n} has {x} {o}. {m} has {y} {o} and {z} {p}.",
        [
            ("How many {o} do they have together?", "+"),
            ("How many more {o} does {n} have than {m}?", "-"),
            ("How many fewer {o} does {m} have than {n}?", "-"),
        ],
    ),
    (
        "{n} has {z} {p} and {x} {o}. {m} has {y} {o}.",
        [("How many {o} do they have together?", "+"), ("How many more {o} does {n} have than {m}?", "-")],
    ),
    ("{n} had {x} {o}. {n} gave {y} {o} to {m}.", [("How many {o} does {n} have left?", "-")]),
    ("{n} had {x} {o} and {z} {p}. {n} gave {y} {o} to {m}.", [("How many {o} does {n} have left?", "-")]),
    ("{n} found {x} {o} at the {place}. {m} gave {n} {y} more {o}.", [("How many {o} does {n} have now?", "+")]),
    ("{n} found {x} {o} and {z} {p} at the {place}. {m} gave {n} {y} more {o}.", [("How many {o} does {n} have now?", "+")]),
    ("There are {x} {o} at the {place}. {n} takes {y} {o} home.", [("How many {o} are left at the {place}?", "-")]),
    ("There are {z} {p} and {x} {o} at the {place}. {n} takes {y} {o} home.", [("How many {o} are left at the {place}?", "-")]),
    ("There are {x} {o} at the {place}. {n} brings {y} {o} and {z} {p}.", [("How many {o} are at the {place} now?", "+")]),
    (
        "{n} bought {x} {o} on Monday and {y} {o} on Friday.",
        [("How many {o} did {n} buy in all?", "+"), ("How many more {o} did {n} buy on Monday than on Friday?", "-")],
    ),
    (
        "{n} bought {x} {o} on Monday, {z} {p} on Tuesday and {y} {o} on Friday.",
        [("How many {o} did {n} buy in all?", "+"), ("How many more {o} did {n} buy on Monday than on Friday?", "-")],
    ),
    ("{n} needs {x} {o}. {n} has {y} {o}.", [("How many more {o} does {n} need?", "-")]),
    ("{n} needs {x} {o}. {n} has {y} {o} and {z} {p}.", [("How many more {o} does {n} need?", "-")]),
    ("After {n} lost {y} {o}, {n} had {x} {o}.", [("How many {o} did {n} have before?", "+")]),
    ("After {n} lost {y} {o}, {n} had {x} {o} and {z} {p}.", [("How many {o} did {n} have before?", "+")]),
    ("{n} is {x} years old. {m} is {y} years younger. They have {z} {o}.", [("How old is {m}?", "-")]),
    ("{n} is {x} years old. {m} is {y} years older. They have {z} {o}.", [("How old is {m}?", "+")]),
    ("{n} has {x} {box}. There are {y} {o} in each of them.", [("How many {o} does {n} have?", "*")]),
    ("{n} has {x} {box} and {z} {p}. There are {y} {o} in each of the {box}.", [("How many {o} does {n} have?", "*")]),
    ("{n} puts {y} {o} in each of {x} {box} and {z} {p} on a table.", [("How many {o} does {n} use?", "*")]),
    ("{n} sells {x} {o} at the {place}. Each costs {y} coins. {n} keeps {z} {o}.", [("How many coins does {n} get?", "*")]),
    ("{n} walks {x} miles each day for {y} days.", [("How many miles does {n} walk?", "*")]),
    ("{n} walks {x} miles each day for {y} days. {m} walks {z} miles.", [("How many miles does {n} walk?", "*")]),
    ("{n} has {x} {o}. {n} shares them equally among {y} friends.", [("How many {o} does each friend get?", "/")]),
    ("{n} has {x} {o} and {z} {p}. {n} shares the {o} equally among {y} friends.", [("How many {o} does each friend get?", "/")]),
    ("{n} puts {x} {o} into {box} with {y} {o} in each.", [("How many {box} does {n} need?", "/")]),
    ("{n} has {z} {p} and puts {x} {o} into {box} with {y} {o} in each.", [("How many {box} does {n} need?", "/")]),
    (
        "{n} picks {x} {o} in {y} days, the same number each day. {m} picks {z} {o}.",
        [("How many {o} does {n} pick each day?", "/")],
    ),
    ("{n} plants {x} flowers in {y} equal rows.", [("How many flowers are in each row?", "/")]),
]

# kind of thing -> attribute -> (questions about {e}, questions from {v} back to the thing, statements)
PHRASES = {
    "animal": {
        "home": (
            ["Where does {e} live?", "In which place does {e} make its home?", "Where can {e} be found?"],
            ["Which animal lives in the {v}?", "Which of these animals would you find in the {v}?"],
            ["{E} lives in the {v}.", "The home of {e} is the {v}."],
        ),
        "food": (
            ["What does {e} eat?", "What is the main food of {e}?", "What does {e} look for when it is hungry?"],
            ["Which animal eats {v}?", "Which of these animals feeds on {v}?"],
            ["{E} eats {v}.", "The food of {e} is {v}."],
        ),
        "cover": (
            ["What covers the body of {e}?", "What does {e} have on its body?", "What keeps the body of {e} safe?"],
            ["Which animal is covered with {v}?", "Which of these animals has {v} on its body?"],
            ["{E} is covered with {v}.", "The body of {e} has {v}."],
        ),
        "move": (
            ["How does {e} move?", "How does {e} get from place to place?", "How does {e} travel?"],
            ["Which animal moves by {v}?", "Which of these animals gets around by {v}?"],
            ["{E} moves by {v}.", "{E} travels by {v}."],
        ),
        "time": (
            ["When is {e} awake?", "When does {e} look for food?", "At what time is {e} most active?"],
            ["Which animal is awake at {v}?", "Which of these animals looks for food at {v}?"],
            ["{E} is awake at {v}.", "{E} looks for food at {v}."],
        ),
    },
    "plant": {
        "place": (
            ["Where does {e} grow?", "Where is {e} found?", "In which place does {e} grow best?"],
            ["Which plant grows in the {v}?", "Which of these plants is found in the {v}?"],
            ["{E} grows in the {v}.", "The {v} is where {e} grows."],
        ),
        "part": (
            ["Which part of {e} do people use?", "What do people take from {e}?", "What is the useful part of {e}?"],
            ["From which plant do people use the {v}?", "Which of these plants is known for its {v}?"],
            ["People use the {v} of {e}.", "The useful part of {e} is the {v}."],
        ),
        "use": (
            ["What is {e} used for?", "What do people make with {e}?", "What is {e} good for?"],
            ["Which plant is used for {v}?", "Which of these plants do people need for {v}?"],
            ["{E} is used for {v}.", "People need {e} for {v}."],
        ),
        "season": (
            ["When is {e} ready?", "In which season do people pick {e}?", "At what time of the year is {e} ready?"],
            ["Which plant is ready in {v}?", "Which of these plants do people pick in {v}?"],
            ["{E} is ready in {v}.", "People pick {e} in {v}."],
        ),
    },
    "tool": {
        "made": (
            ["What is {e} made of?", "Which material is used to make {e}?", "From what do people build {e}?"],
            ["Which tool is made of {v}?", "Which of these tools is built from {v}?"],
            ["{E} is made of {v}.", "People make {e} from {v}."],
        ),
        "use": (
            ["What is {e} used for?", "What can a person do with {e}?", "Why would a person need {e}?"],
            ["Which tool is used for {v}?", "Which of these tools is best for {v}?"],
            ["{E} is used for {v}.", "People need {e} for {v}."],
        ),
        "worker": (
            ["Who uses {e}?", "Which worker needs {e}?", "Who works with {e}?"],
            ["Which tool does a {v} use?", "Which of these tools belongs to a {v}?"],
            ["A {v} uses {e}.", "{E} belongs to a {v}."],
        ),
        "store": (
            ["Where is {e} kept?", "Where would you look for {e}?", "In which place do people keep {e}?"],
            ["Which tool is kept in the {v}?", "Which of these tools would you look for in the {v}?"],
            ["{E} is kept in the {v}.", "People keep {e} in the {v}."],
        ),
    },
    "material": {
        "source": (
            ["Where does {e} come from?", "What is the source of {e}?", "From what do people get {e}?"],
            ["Which material comes from {v}?", "Which of these materials do people get from {v}?"],
            ["{E} comes from {v}.", "People get {e} from {v}."],
        ),
        "feel": (
            ["How does {e} feel?", "What is {e} like?", "Which word tells how {e} feels?"],
            ["Which material is {v}?", "Which of these materials feels {v}?"],
            ["{E} is {v}.", "{E} feels {v}."],
        ),
        "product": (
            ["What do people make from {e}?", "What can be made of {e}?", "What do workers build with {e}?"],
            ["Which material is used to make {v}?", "Which of these materials do people need for {v}?"],
            ["People make {v} from {e}.", "{E} is good for making {v}."],
        ),
        "change": (
            ["What happens to {e} in a fire?", "What does {e} do when it gets very hot?", "How does great heat change {e}?"],
            ["Which material will {v} in a fire?", "Which of these materials will {v} when it gets very hot?"],
            ["{E} will {v} in a fire.", "When it gets very hot, {e} will {v}."],
        ),
    },
}

# kind -> rows "thing: value, value, ..." in the order of the attributes in PHRASES
THINGS = {
    "animal": """
fox: forest, mice, fur, running, night
owl: barn, mice, feathers, flying, night
bear: forest, berries, fur, walking, noon
deer: forest, leaves, hair, running, dawn
shark: ocean, fish, scales, swimming, night
whale: ocean, shrimp, smooth skin, swimming, noon
seal: ice, fish, fur, swimming, noon
penguin: ice, fish, feathers, swimming, noon
camel: desert, grass, hair, walking, noon
lizard: desert, insects, scales, running, noon
snake: desert, mice, scales, crawling, night
frog: pond, insects, smooth skin, jumping, night
duck: pond, seeds, feathers, swimming, noon
beaver: river, wood, fur, swimming, night
otter: river, fish, fur, swimming, dawn
trout: river, insects, scales, swimming, dawn
eagle: mountains, rabbits, feathers, flying, noon
goat: mountains, grass, hair, climbing, noon
wolf: mountains, deer, fur, running, night
lion: grassland, zebras, fur, running, dusk
zebra: grassland, grass, hair, running, noon
snail: garden, leaves, a shell, crawling, night
rabbit: grassland, grass, fur, jumping, dusk
robin: garden, worms, feathers, flying, noon
bee: garden, nectar, hair, flying, noon
mole: soil, worms, fur, digging, night
worm: soil, dead leaves, smooth skin, digging, night
monkey: jungle, fruit, hair, climbing, noon
tiger: jungle, deer, fur, walking, night
parrot: jungle, seeds, feathers, flying, noon
bat: cave, insects, fur, flying, dusk
crab: beach, dead fish, a shell, walking, dusk
turtle: beach, sea grass, a shell, swimming, noon
sheep: barn, grass, wool, walking, noon""",
    "plant": """
cactus: desert, juice, drinks, summer
oak: forest, wood, furniture, winter
pine: mountains, wood, paper, winter
bamboo: jungle, stem, fences, spring
rice: wet field, seeds, soup, autumn
wheat: dry field, seeds, bread, summer
cotton: dry field, soft hairs, shirts, autumn
carrot: garden, root, salad, autumn
potato: garden, root, soup, autumn
rose: garden, petals, perfume, summer
mint: garden, leaves, tea, spring
corn: dry field, seeds, animal food, autumn
cocoa: jungle, beans, sweets, winter
grape: hillside, fruit, wine, autumn
olive: hillside, fruit, oil, winter
onion: garden, bulb, soup, summer
seaweed: ocean, leaves, salad, spring
maple: forest, juice, sweets, spring
sunflower: dry field, seeds, oil, summer
reed: pond, stem, baskets, autumn""",
    "tool": """
hammer: steel, hitting nails, builder, workshop
saw: steel, cutting wood, builder, workshop
needle: steel, sewing clothes, tailor, drawer
rake: wood, moving leaves, gardener, shed
shovel: iron, digging holes, gardener, shed
broom: straw, sweeping floors, cleaner, closet
sponge: foam, washing dishes, cook, kitchen
ladle: wood, serving soup, cook, kitchen
oven: iron, baking bread, baker, kitchen
thermometer: glass, measuring heat, doctor, hospital
lens: glass, seeing tiny things, scientist, laboratory
telescope: brass, watching stars, scientist, tower
compass: brass, finding north, sailor, ship
anchor: iron, stopping a ship, sailor, ship
net: string, catching fish, fisher, boat
bucket: plastic, carrying water, farmer, barn
plow: iron, turning soil, farmer, barn
brush: hair, painting pictures, painter, studio
ladder: wood, reaching high places, painter, shed
stapler: steel, joining paper, teacher, school
chalk: stone, writing on boards, teacher, school
scale: brass, weighing goods, trader, shop
rope: string, climbing rocks, climber, tent
lamp: glass, lighting tunnels, miner, mine""",
    "material": """
wool: sheep, soft, sweaters, burn
leather: cows, tough, shoes, burn
silk: worms, smooth, ties, burn
honey: bees, sticky, sweets, boil
wax: bees, slippery, candles, melt
rubber: trees, bouncy, tires, burn
paper: wood, thin, books, burn
glass: sand, smooth, windows, melt
clay: soil, sticky, pots, harden
brick: clay, rough, walls, stay the same
iron: rocks, heavy, bridges, glow
gold: rocks, heavy, rings, melt
copper: rocks, hard, wires, glow
salt: the sea, rough, snacks, stay the same
plastic: oil, light, bottles, melt
concrete: rocks, hard, roads, stay the same
cork: trees, light, stoppers, burn
flour: wheat, soft, bread, turn brown""",
}

# Ways to put a question about {e}. {q} is the question itself; after a sentence that names the thing it says "the animal".
CARRIERS = [
    "{q}",
    "A class learns about {e}. {q}",
    "A student draws a picture of {e}. {q}",
    "A book has a page on {e}. {q}",
    "Think of {e}. {q}",
]
