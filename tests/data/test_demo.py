"""The demo world is what it claims, and the bundled model can do it."""

import collections
import itertools
import json
import random

import pytest

import named
import world
from bitatlas.data import DATA_DIR, MODEL_DIR, PROBLEMS_FILE, QUESTIONS_FILE, TEXT_FILE
from tables import STORIES, THINGS

SEED = 0  # of the bundled model and files


def asked_in(split):
    """Every question of a split, fact by fact."""
    return [asked for questions in world.all_questions(split) for asked in questions]


@pytest.fixture(scope="module")
def problems():
    return json.loads(PROBLEMS_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def questions():
    return [json.loads(line) for line in QUESTIONS_FILE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def training_text():
    """A sample of the stream that the model is trained on."""
    return list(itertools.islice(world.documents(random.Random("any"), "train"), 20_000))


def test_same_seed_same_world():
    for split in world.SPLIT_PERCENT:
        first, second = (list(itertools.islice(world.documents(random.Random(3), split), 200)) for _ in range(2))
        assert first == second
    assert world.task_problems(1) == world.task_problems(1) != world.task_problems(2)
    assert world.task_questions(1) == world.task_questions(1) != world.task_questions(2)


def test_bundled_files_are_what_the_seed_gives(tmp_path):
    world.write_data(tmp_path, SEED)
    for file in (PROBLEMS_FILE, QUESTIONS_FILE, TEXT_FILE):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    assert TEXT_FILE.parent == DATA_DIR
    assert 250_000 < TEXT_FILE.stat().st_size < 350_000


def test_splits_share_no_problem():
    keys = {
        split: {world.draw_problem(random.Random(number), split)[0] for number in range(3000)} for split in world.SPLIT_PERCENT
    }
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other


def test_splits_share_no_question_and_cover_every_fact_in_training():
    asked = {split: {question for _, question, _, _ in asked_in(split)} for split in world.SPLIT_PERCENT}
    for one, other in itertools.combinations(asked.values(), 2):
        assert not one & other
    assert {fact for fact, *_ in asked_in("train")} == set(world.FACTS)


def test_no_test_item_in_training_or_in_the_text(problems, questions, training_text):
    held_out = TEXT_FILE.read_text(encoding="utf-8")
    trained = set(training_text)
    prompts = {document.split("\nAnswer:")[0] + "\nAnswer:" for document in trained}
    for prompt in [world.problem_prompt(problem) for problem in problems] + [
        world.question_prompt(question) for question in questions
    ]:
        assert prompt not in prompts and prompt not in held_out
    assert not trained & {document + "\n\n" for document in held_out.split("\n\n") if document.startswith("Question:")}


def test_answers_agree_with_equations(problems):
    assert len(problems) == world.TASK_ITEMS == len({problem["ID"] for problem in problems})
    assert {problem["Type"] for problem in problems} == set(world.TYPES.values())
    for problem in problems:
        x, operator, y = problem["Equation"].strip("() ").split()
        assert eval(problem["Equation"]) == problem["Answer"]  # an oracle apart from world.solve; the file is our own
        assert 0 <= problem["Answer"] <= 99 and world.TYPES[operator] == problem["Type"]
        words = problem["Body"].replace(".", " ").split()
        assert {f"{float(x):.0f}", f"{float(y):.0f}"} <= set(words)


def test_many_problems_hold_a_number_that_is_not_needed(problems):
    numbers = [sum(word.strip(".,").isdigit() for word in problem["Body"].split()) for problem in problems]
    assert sum(count == 3 for count in numbers) > len(problems) / 3
    assert sum(len(asked) for _, asked in STORIES) >= 25


def test_exactly_one_choice_is_right(questions):
    """Looked up in the table of facts by the words of the question, not by how the question was made."""
    assert len(questions) == world.TASK_ITEMS == len({question["question"] for question in questions})
    known = {(question, right) for split in world.SPLIT_PERCENT for _, question, right, _ in asked_in(split)}
    for question in questions:
        texts = [choice["text"] for choice in question["choices"]]
        assert [choice["label"] for choice in question["choices"]] == list("ABCD") and len(set(texts)) == 4
        right = [label for label, text in zip("ABCD", texts, strict=True) if (question["question"], text) in known]
        assert right == [question["answerKey"]]


def test_questions_ask_for_facts_of_every_kind(questions):
    kinds = {question: fact[0] for fact, question, _, _ in asked_in("test")}  # a wording names its kind of thing, or one thing
    counts = collections.Counter(kinds[question["question"]] for question in questions)
    assert set(counts) == set(world.PHRASES)
    assert max(counts.values()) - min(counts.values()) <= 6  # not 1: a wording that asks for several facts is taken once


def test_facts_are_consistent():
    assert 1500 <= len(world.FACTS) <= 2500
    assert len({fact[:3] for fact in world.FACTS}) == len(world.FACTS)
    assert {kind for kind, *_ in world.FACTS} == set(world.PHRASES) == {*THINGS, *named.PHRASES}
    for kind, attributes in world.PHRASES.items():
        facts = [fact for fact in world.FACTS if fact[0] == kind]
        assert len(facts) == len({thing for _, thing, _, _ in facts}) * len(attributes)
        for attribute in attributes:
            values = {value for _, _, a, value in facts if a == attribute}
            assert len(values) >= 4, f"{kind} {attribute}: too few values for three wrong choices"
    towns = {thing for kind, thing, *_ in world.FACTS if kind == "town"}
    homes = {value for kind, _, attribute, value in world.FACTS if (kind, attribute) == ("person", "town")}
    assert len(towns) == named.TOWNS and homes == towns


def test_named_facts_are_even_and_follow_the_seed():
    """No value is a good guess, and no two attributes go together more than chance has it."""
    assert named.named_facts(1) == named.named_facts(1) != named.named_facts(2)
    columns = {}
    for kind, _, attribute, value in named.named_facts(SEED):
        columns.setdefault((kind, attribute), []).append(value)
    for values in columns.values():
        counts = [values.count(value) for value in set(values)]
        assert max(counts) - min(counts) <= 1
    for kind, attributes in named.PHRASES.items():
        for one, other in itertools.combinations(attributes, 2):
            pairs = list(zip(columns[kind, one], columns[kind, other], strict=True))
            cells = len(set(columns[kind, one])) * len(set(columns[kind, other]))
            assert len(set(pairs)) > 0.9 * cells * (1 - (1 - 1 / cells) ** len(pairs))  # as many different pairs as by chance


# ---- the bundled model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_tokenizer_round_trip(tokenizer):
    text = TEXT_FILE.read_text(encoding="utf-8")[:20_000] + " déjà vu — 123"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) == 1536
    assert all(len(tokenizer(f" {number}", add_special_tokens=False)["input_ids"]) == 1 for number in range(1, 41))


def test_tokenizer_is_what_the_seed_gives(tokenizer):
    train = pytest.importorskip("train")
    assert train.make_tokenizer(SEED).get_vocab() == tokenizer.get_vocab()


def test_model_is_small_and_regular(model):
    torch = pytest.importorskip("torch")
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 6_000_000
    assert model.config.num_hidden_layers == 16
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 128 == 0 and module.out_features % 64 == 0


def test_model_solves_problems(model, tokenizer, problems):
    score = pytest.importorskip("score")
    assert score.share(score.problems_right(model, tokenizer, problems[:60])) >= 0.85


def test_model_answers_questions(model, tokenizer, questions):
    score = pytest.importorskip("score")
    assert score.share(score.questions_right(model, tokenizer, questions[:60])) >= 0.80


def test_muon_steps_like_torchs():
    """torch's iterates in bfloat16 (8 bits of mantissa, five iterations of three products), so a few percent of a step's length."""
    torch = pytest.importorskip("torch")
    muon = pytest.importorskip("muon")
    torch.manual_seed(0)
    shapes = [(16, 24), (16, 24), (32, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        muon.Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            q.data.copy_(p.data)
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q, start in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() <= 0.05 * (p - start).norm()


def test_repetitions_ask_for_nothing_unknowable(tokenizer):
    train = pytest.importorskip("train")
    tokens, labels = next(train.repetitions(tokenizer, SEED, 6))
    assert tokens.shape == labels.shape == (6, train.ROW_TOKENS)
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        asked = [place for place, label in enumerate(wanted) if label != -100]
        block = asked[0] - 1  # <bos> and one block are given
        assert train.REPEATED_BLOCK[0] <= block <= train.REPEATED_BLOCK[1]
        assert asked == list(range(1 + block, train.ROW_TOKENS))
        assert all(row[place] == wanted[place] == row[place - block] for place in asked)
        assert len(set(row[1 : 1 + block])) == block
