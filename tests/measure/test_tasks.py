"""Scores through the harness against log-likelihoods and greedy decoding done by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import tiny
from bitatlas.data.numbers import read_number
from bitatlas.data.tasks import TASKS, load_items, task_text
from bitatlas.errors import UserError
from bitatlas.measure.scorer import Scorer
from bitatlas.measure.tasks import first_line, line_decided, score_items
from bitatlas.model.decoder import decoder_of
from task_files import PROBLEMS, QUESTIONS, needs_shared
from tiny import SHARED

# --- scoring -----------------------------------------------------------------------------------------------------------


def byte_tokenizer(**special):
    """A token a byte; `special` names the special tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def small_llama(context=160):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="</s>")


@pytest.fixture(scope="module")
def learned(tokenizer, tmp_path_factory):
    """A tiny model that knows PROBLEMS and QUESTIONS by heart (120 steps of training), and the items."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "ARC-Easy-test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (folder / "SVAMP.json").write_text(json.dumps(PROBLEMS))
    items = {task: load_items(task, folder, None, seed=0) for task in ("svamp", "arc_easy")}
    texts = [block + "\n\n" for task in items for block in task_text(task, items[task]).strip().split("\n\n")]
    rows = tokenizer(texts)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, items


@torch.no_grad()
def likelihoods(model, tokenizer, item, before=""):
    """Summed log-likelihood of each choice, one forward pass each, nats."""
    context = model.config.max_position_embeddings
    prompt = f"{before}Question: {item['question']}\nAnswer:"
    start = len(tokenizer(prompt)["input_ids"])
    sums = []
    for text in item["choices"]:
        whole = tokenizer(f"{prompt} {text}")["input_ids"]
        scored = len(whole) - start
        ids = torch.tensor([whole[-(context + 1) :]])
        logprobs = model(ids[:, :-1]).logits.double().log_softmax(-1)[0, -scored:]
        sums.append(logprobs.gather(-1, ids[0, -scored:, None]).sum().item())
    return sums


@torch.no_grad()
def greedy(model, tokenizer, prompt, tokens, stops):
    """The greedy continuation, the whole text run again for each token."""
    ids = tokenizer(prompt)["input_ids"][-(model.config.max_position_embeddings - tokens) :]
    start = len(ids)
    while len(ids) < start + tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        if ids[-1] == tokenizer.eos_token_id or any(stop in text for stop in stops):
            break
    return min((text.split(stop)[0] for stop in stops), key=len)


def assert_choices_equal_brute_force(model, tokenizer, items, records, before=""):
    for item, record in zip(items, records, strict=True):
        sums = likelihoods(model, tokenizer, item, before)
        best = sorted(sums)
        if best[-1] - best[-2] > 1e-3:  # nearer than that, float32 may pick either
            assert record["answer"] == item["choices"][sums.index(best[-1])]
            assert record["correct"] == (sums.index(best[-1]) == item["gold"])
        assert record["item"] == item["id"]
        assert record["expected"] == item["choices"][item["gold"]]


def test_a_model_that_knows_the_answers_gets_them_right(learned, tokenizer):
    model, items = learned
    for task in ("svamp", "arc_easy"):
        records = score_items(model, tokenizer, task, items[task])
        assert [record["item"] for record in records] == [item["id"] for item in items[task]]
        assert all(record["correct"] for record in records)
        assert all(record["answer"] == record["expected"] for record in records)
        assert not any(record["truncated"] for record in records)
    by_id = {record["item"]: record for record in score_items(model, tokenizer, "svamp", items["svamp"])}
    assert by_id["p1"]["output"].strip() == "26 - 9 = 17"
    wrong = [{**item, "answer": "18"} for item in items["svamp"]]
    assert not any(record["correct"] for record in score_items(model, tokenizer, "svamp", wrong))


def test_the_weights_in_memory_are_scored(learned, tokenizer):
    model, items = learned
    before = score_items(model, tokenizer, "arc_easy", items["arc_easy"])
    name = "model.layers.1.mlp.down_proj"
    with decoder_of(model).swapped({name: 3 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))}):
        records = score_items(model, tokenizer, "arc_easy", items["arc_easy"])
        assert_choices_equal_brute_force(model, tokenizer, items["arc_easy"], records)
        assert not all(record["correct"] for record in score_items(model, tokenizer, "svamp", items["svamp"]))
    assert score_items(model, tokenizer, "arc_easy", items["arc_easy"]) == before


POISONS = {
    "short": {"max_new_tokens": 1, "max_length": 20},
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.5, "num_beams": 3, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 2.0, "guidance_scale": 3.0},
    "suppressed": {"suppress_tokens": list(range(48, 58)), "begin_suppress_tokens": [32], "bad_words_ids": [[49]]},
    "forced": {"forced_bos_token_id": 40, "forced_eos_token_id": 41, "min_new_tokens": 40, "min_length": 150},
    "ends": {"eos_token_id": list(range(200)), "stop_strings": [" ", "="], "pad_token_id": 7, "bos_token_id": 9},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "use_cache": False},
    "assisted": {"prompt_lookup_num_tokens": 3, "renormalize_logits": True, "sequence_bias": [[[49], -50.0]], "max_time": 1e-9},
}


@pytest.mark.parametrize("poison", POISONS)
def test_generation_settings_never_reach_the_scores(learned, tokenizer, poison):
    model, items = learned
    clean = {task: score_items(model, tokenizer, task, items[task]) for task in ("svamp", "arc_easy")}
    before = model.generation_config
    try:
        poisoned = model.generation_config = GenerationConfig(**POISONS[poison])
        for task, records in clean.items():
            assert score_items(model, tokenizer, task, items[task]) == records
        assert model.generation_config is poisoned
    finally:
        model.generation_config = before
    assert any(record["correct"] for record in clean["svamp"])


def test_generation_settings_in_a_folder_never_reach_the_scores(learned, tokenizer, tmp_path):
    """As `from_pretrained` takes them from generation_config.json, and as old checkpoints have them in config.json."""
    model, items = learned
    clean = score_items(model, tokenizer, "svamp", items["svamp"])
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 1, "num_return_sequences": 2, "num_beams": 2}))
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_beams": 3, "max_length": 5, "do_sample": True}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert score_items(loaded, tokenizer, "svamp", items["svamp"]) == clean
    loaded.config.num_beams = 3
    assert score_items(loaded, tokenizer, "svamp", items["svamp"]) == clean


def merging_tokenizer(*merges):
    """A byte tokenizer that makes one token of each pair in `merges` (bytes as the tokenizer shows them, a space is Ġ)."""
    backend = json.loads(byte_tokenizer(eos_token="</s>").backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    for number, pair in enumerate(merges):
        vocabulary["".join(pair)] = 257 + number
    backend["model"]["merges"] = [list(pair) for pair in merges]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="</s>")


@torch.no_grad()
def test_choices_that_merge_with_the_question(learned):
    """The harness drops what merges; here all choices are scored from where the first of them differs from the question's tokens."""
    model, _ = learned
    merging = merging_tokenizer(("Ġ", "5"), (":", "Ġ5"))
    item = {"id": "arms", "question": "How many arms?", "choices": ["5", "6", "57", "5"], "gold": 0, "chance": 0.25}
    records = score_items(model, merging, "arc_easy", [item, {**item, "id": "again"}])
    prompt = f"Question: {item['question']}\nAnswer:"
    start = len(merging(prompt)["input_ids"]) - 1  # up to the colon, with which " 5" merges
    sums = []
    for choice in item["choices"]:
        ids = torch.tensor([merging(f"{prompt} {choice}")["input_ids"]])
        logprobs = model(ids[:, :-1]).logits.double().log_softmax(-1)[0, start - 1 :]
        sums.append(logprobs.gather(-1, ids[0, start:, None]).sum().item())
    best = max(range(4), key=lambda place: sums[place])
    assert [record["answer"] for record in records] == [item["choices"][best]] * 2
    norms = [total / len(choice) for total, choice in zip(sums, item["choices"], strict=True)]
    assert records[0]["correct_norm"] == (max(range(4), key=lambda place: norms[place]) == 0)


def test_a_choice_without_tokens_is_one_clear_line(learned):
    model, _ = learned
    letters = {letter: number for number, letter in enumerate("QuestionAwr:b")}
    dropping = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")
    item = {"id": "q", "question": "b", "choices": ["b", "zzz"], "gold": 0, "chance": 0.5}
    with pytest.raises(UserError, match="--tasks arc_easy: a choice of item q has no tokens of its own after the question"):
        score_items(model, dropping, "arc_easy", [item])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"b": 0}, unk_token="?")), eos_token="</s>")
    for task in ("arc_easy", "svamp"):
        with pytest.raises(UserError, match="--tasks: the model's tokenizer cannot read an item's text"):
            score_items(model, words, task, [{**item, "answer": "1", "worked": "1"}])


def test_normalized_accuracy_is_the_likelihood_per_character(learned, tokenizer):
    model, items = learned
    unlike = [
        {**item, "choices": [text * (1 + place) for place, text in enumerate(item["choices"])]} for item in items["arc_easy"]
    ]
    for item, record in zip(unlike, score_items(model, tokenizer, "arc_easy", unlike), strict=True):
        norms = [total / len(text) for total, text in zip(likelihoods(model, tokenizer, item), item["choices"], strict=True)]
        assert record["correct_norm"] == (norms.index(max(norms)) == item["gold"])


def test_shards_and_batches_do_not_change_records(learned, tokenizer):
    model, items = learned
    for task in ("svamp", "arc_easy"):
        whole = score_items(model, tokenizer, task, items[task])
        shards = [
            score_items(model, tokenizer, task, items[task][n : n + 2], batch_size=1) for n in range(0, len(items[task]), 2)
        ]
        assert [record for shard in shards for record in shard] == whole
    assert score_items(model, tokenizer, "svamp", []) == []


class Seen:
    """Log-likelihoods of requests, by our scorer and by the harness's own model class."""

    def __init__(self, model, tokenizer, items):
        scorer = Scorer(pretrained=model, tokenizer=tokenizer, batch_size=4)
        instances = [
            Instance(
                request_type="loglikelihood",
                doc=item,
                arguments=(f"Question: {item['question']}\nAnswer:", f" {choice}"),
                idx=0,
                metadata=("arc_easy", 0, 1),
            )
            for item in items
            for choice in item["choices"]
        ]
        with torch.no_grad():
            self.ours = scorer.loglikelihood(instances, disable_tqdm=True)
            self.plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(instances, disable_tqdm=True)

    def assert_equal(self):
        for (ours, greedily), (plain, plain_greedily) in zip(self.ours, self.plain, strict=True):
            assert ours == pytest.approx(plain, rel=1e-4)  # float32: sums of tens of logarithms
            assert greedily == plain_greedily


def test_packed_choices_score_as_the_harness_scores_them(learned, tokenizer):
    model, items = learned
    Seen(model, tokenizer, items["arc_easy"]).assert_equal()
    long = {"id": "long", "question": "why " * 60, "choices": ["a", "bc", "bcd"], "gold": 0}  # loses its beginning
    Seen(model, tokenizer, [*items["arc_easy"][:2], long]).assert_equal()
    Seen(model, tokenizer, [{**long, "choices": ["a"]}]).assert_equal()


class Odd(torch.nn.Module):
    """A model that reads packed rows wrongly, or not at all."""

    def __init__(self, model, refuses):
        super().__init__()
        self.model, self.refuses, self.packed = model, refuses, 0

    def forward(self, input_ids, position_ids=None, attention_mask=None, **options):
        if position_ids is not None:
            self.packed += 1
            if self.refuses:
                raise TypeError("no position_ids")
        return self.model(input_ids, **options)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_model_that_cannot_read_packed_rows_is_scored_by_the_harness(learned, tokenizer, monkeypatch, refuses):
    model, items = learned
    expected = score_items(model, tokenizer, "arc_easy", items["arc_easy"])
    odd = Odd(small_llama(), refuses)
    odd.model.load_state_dict(model.state_dict())
    monkeypatch.setattr(model, "forward", odd.forward)
    assert score_items(model, tokenizer, "arc_easy", items["arc_easy"]) == expected
    Seen(model, tokenizer, items["arc_easy"]).assert_equal()
    assert odd.packed == 2  # one pack a call, then the harness


BITS = ["17", " ", "\n", "\r", "\u2028", "x", "answer is ", "####", "= 3", "3/4", "-", ".", "Question:", "\n\n"]


def test_what_is_decided_no_later_text_changes():
    """The number is read of the first line that is not empty, whatever the model would have written after it."""
    random = np.random.default_rng(0)
    decided = 0
    for _ in range(4000):
        output = "".join(random.choice(BITS, random.integers(1, 8)))
        if line_decided(output):
            decided += 1
            longer = output + "".join(random.choice(BITS, random.integers(1, 8)))
            assert first_line(longer) == first_line(output)
            assert read_number("problem", longer) == read_number("problem", output) == read_number("problem", first_line(output))
            for stop in ("\n\n", "Question:"):
                if stop not in output:  # cut there, the answer is the same
                    assert read_number("problem", longer.split(stop)[0]) == read_number("problem", output)
    assert decided > 500


def test_examples_stand_before_the_prompt(learned, tokenizer):
    model, items = learned
    item, example = items["svamp"][:2]
    (record,) = score_items(model, tokenizer, "svamp", [{**item, "examples": [example]}])
    prompt = task_text("svamp", [example]) + f"\nQuestion: {item['question']}\nAnswer:"
    assert record["output"] == greedy(model, tokenizer, prompt, 48, ["\n\n", "Question:", "</s>"])
    assert record["truncated"] == (len(tokenizer(prompt)["input_ids"]) > 160 - 48)
    example, *chosen = items["arc_easy"]
    records = score_items(model, tokenizer, "arc_easy", [{**item, "examples": [example]} for item in chosen])
    assert_choices_equal_brute_force(model, tokenizer, chosen, records, task_text("arc_easy", [example]) + "\n")


def test_long_prompts_lose_their_beginning_and_long_choices_are_refused(tokenizer):
    model = small_llama(context=64)
    long = {"id": "long", "question": "why " * 40, "choices": ["a", "bc"], "gold": 0, "chance": 0.5}
    records = score_items(model, tokenizer, "arc_easy", [long, {**long, "id": "short", "question": "why"}])
    assert [record["truncated"] for record in records] == [True, False]
    assert_choices_equal_brute_force(model, tokenizer, [long], records[:1])
    problem = {"id": "p", "question": "why " * 40, "answer": "1", "worked": "1", "chance": 0.01}
    (record,) = score_items(model, tokenizer, "gsm8k", [problem])
    assert record["truncated"]
    with pytest.raises(UserError, match="a choice of item long is longer than the model's context \\(64 tokens\\)"):
        score_items(model, tokenizer, "arc_easy", [{**long, "choices": ["a", "b" * 64]}])


@pytest.mark.parametrize(
    "special", [{}, {"unk_token": "<unk>"}, {"bos_token": "<s>"}, {"eos_token": "</s>", "pad_token": "<pad>"}]
)
def test_any_special_token_will_do_and_the_tokenizer_is_left_as_it_was(learned, special):
    model, items = learned
    own = byte_tokenizer(**special)
    before = (own.eos_token, own.pad_token, own.padding_side, len(own))
    if not special:
        with pytest.raises(UserError, match="the tokenizer has no end-of-text"):
            score_items(model, own, "svamp", items["svamp"])
    else:
        assert all(record["correct"] for record in score_items(model, own, "svamp", items["svamp"]))
        assert all(record["correct"] for record in score_items(model, own, "arc_easy", items["arc_easy"]))
    assert (own.eos_token, own.pad_token, own.padding_side, len(own)) == before


def test_scoring_is_silent_and_leaves_random_numbers_alone(learned, tokenizer, capfd):
    model, items = learned
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for task in ("svamp", "arc_easy"):
        score_items(model, tokenizer, task, items[task])
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")


# --- a trained model and real items --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baby():
    folder = SHARED / "models" / "babyllama-105"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@needs_shared
def test_arc_equals_brute_force_on_real_items(baby):
    items = load_items("arc_easy", SHARED / "data", None, seed=0)
    odd = [item for item in items if len(item["choices"]) != 4][:4]
    chosen = items[:20] + odd
    records = score_items(*baby, "arc_easy", chosen)
    assert {len(item["choices"]) for item in chosen} >= {3, 4, 5}
    assert_choices_equal_brute_force(*baby, chosen, records)
    lengths = [max(len(baby[1](f"Question: {i['question']}\nAnswer: {c}")["input_ids"]) for c in i["choices"]) for i in chosen]
    assert [record["truncated"] for record in records] == [length > 257 for length in lengths]


@needs_shared
def test_svamp_equals_greedy_decoding_on_real_items(baby):
    items = load_items("svamp", SHARED / "data", 4, seed=0)
    records = score_items(*baby, "svamp", items)
    stops = ["\n\n", "Question:", "</s>"]
    for item, record in zip(items, records, strict=True):
        assert record["output"] == greedy(*baby, f"Question: {item['question']}\nAnswer:", 48, stops)
        assert record["correct"] == (read_number("problem", record["output"]) == float(item["answer"]))


# --- a process of its own ------------------------------------------------------------------------------------------------

ALONE = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = sys.argv[1].split(":")
from bitatlas.errors import UserError
from bitatlas.data.tasks import load_items
from bitatlas.measure.tasks import score_items
heavy = sorted({"lm_eval", "datasets"} & set(sys.modules))
from test_tasks import byte_tokenizer, small_llama
told = []
for task in ("svamp", "arc_easy", "gsm8k"):
    try:
        load_items(task, None, 5, 0)
    except UserError as error:
        told.append(str(error))
before = {str(path) for path in Path(sys.argv[2]).rglob("*")}
item = {"id": "a", "question": "b", "answer": "1", "worked": "1", "chance": 0.01}
score_items(small_llama(), byte_tokenizer(eos_token="</s>"), "svamp", [item])
written = sorted({str(path) for path in Path(sys.argv[2]).rglob("*")} - before)
print(json.dumps({"told": told, "written": written, "heavy": heavy}))
"""


@pytest.mark.slow
def test_without_a_network_and_without_writing(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    folders = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "TMPDIR"), str(home))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= folders | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ALONE, f"{Path(__file__).parent}:{Path(tiny.__file__).parent}", str(home)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["heavy"] == []
    assert result["written"] == []
    for told, task in zip(result["told"], ("svamp", "arc_easy", "gsm8k"), strict=True):
        assert f"--tasks {task}: the data set {TASKS[task].hub[0]} cannot be had" in told
        assert f"--task-data DIR with {TASKS[task].file} in it" in told
        assert "\n" not in told
