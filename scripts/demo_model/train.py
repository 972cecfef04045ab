"""Train the demo model from a seed: tokenizer, 16-layer Llama of 2.5 million weights, task files, model card.

    python scripts/demo_model/train.py --out DIR [--seed 0] [--steps 1600] [--repeat-steps 900] [--last-steps 400]
        [--data-only | --card-only | --from MODEL]

Deep and narrow, so that there are 16 layers to compare, and small enough to ship and to measure in seconds. Matrices are
trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), the embedding and norms with AdamW; learning
rate: warm-up, constant, linear decay to zero. Then a second, shorter phase, where three of four rows are a random block of tokens
over and over: only a head that looks back to what followed last time (an induction head, arXiv:2209.11895) predicts those, and
the made-up world alone gave the model no need of one. A third phase has an eighth of such rows, to get back what the second one
cost in sums and facts. Nothing in the training knows about quantization.

Needs a C++ compiler (for torch.compile); about half an hour for each phase on one CPU core. The bundled model's first phase was
trained with torch.optim.Muon, which iterates in bfloat16, on a CPU that has bfloat16 arithmetic; the others with `muon.py`.
The data depend on the seed alone, on every machine. The weights also depend on the number of threads, the CPU and the torch
version (sums run in another order), so another machine gives a model as good, not the same bytes.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import card
import world
from bitatlas.data import MODEL_DIR
from muon import Muon

VOCABULARY = 1536
ROW_TOKENS = 256
BATCH_ROWS = 16
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1
REPEATED_ROWS = 12  # of each batch of the second phase
KEPT_ROWS = 2  # such rows in the third phase
REPEATED_BLOCK = (8, 64)  # tokens of the block that such a row repeats
DEFAULT_STEPS = 1600
DEFAULT_REPEAT_STEPS = 900
DEFAULT_LAST_STEPS = 400
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
# words with their space, numbers of up to three digits with theirs, the rest; so " 26" can be one token
PIECES = r" ?\p{L}+| ?\d{1,3}| ?[^\s\p{L}\d]+|\s+"


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on documents of the training split; puts <bos> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    stream = world.documents(random.Random(f"tokenizer {seed}"), "train")
    tokenizer.train_from_iterator((next(stream) for _ in range(20_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model; what writes to the residual stream starts smaller, by the square root of its 32 additions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight /= (2 * config.num_hidden_layers) ** 0.5
    return model


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield endless [BATCH_ROWS, ROW_TOKENS] tokens: each row whole documents from its start, <bos> in front of every second row."""
    stream = world.documents(random.Random(f"training {seed}"), "train")
    while True:
        texts = [next(stream) for _ in range(4000)]
        rows: list[list[int]] = []
        row: list[int] = []
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            if not row and len(rows) % 2:
                row = [tokenizer.bos_token_id]
            row = row + ids
            if len(row) >= ROW_TOKENS:
                rows.append(row[:ROW_TOKENS])
                row = []
        for start in range(0, len(rows) - BATCH_ROWS + 1, BATCH_ROWS):
            yield torch.tensor(rows[start : start + BATCH_ROWS])


def repetitions(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless tokens and labels of repeated blocks, each [count, ROW_TOKENS]. Labels leave out (-100) a block's first time."""
    chance = random.Random(f"repetitions {seed}")
    ordinary = range(len(SPECIAL), len(tokenizer))
    while True:
        blocks = [chance.sample(ordinary, chance.randint(*REPEATED_BLOCK)) for _ in range(count)]
        rows = [[tokenizer.bos_token_id, *block * (ROW_TOKENS // len(block) + 1)][:ROW_TOKENS] for block in blocks]
        tokens = torch.tensor(rows)
        labels = tokens.clone()
        for row, block in zip(labels, blocks, strict=True):
            row[: 1 + len(block)] = -100
        yield tokens, labels


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers, AdamW for the embedding (used twice, so slower) and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [adamw, Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)]


def rate_at(step: int, steps: int) -> float:
    """Return learning rate over its peak: up in the first 100 steps, down to zero in the last 40 %."""
    return min((step + 1) / 100, 1.0, (steps - step) / (0.4 * steps))


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    for group in (group for o in optimizers for group in o.param_groups):
        group["lr"] = LEARNING_RATE * rate_at(step, steps)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (bfloat16) and tokenizer as a checkpoint folder."""
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class name that releases before 5 know too
    settings.write_text(
        settings.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8"
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, folder: Path) -> None:
    """Train in place; prints progress, and saves a checkpoint every 200 steps."""
    optimizers = make_optimizers(model)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, labels=tokens, use_cache=False).loss

    fast_loss_of, stream, start, smooth = torch.compile(loss_of), batches(tokenizer, seed), time.time(), 0.0
    for step in range(steps):
        set_rate(optimizers, step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = fast_loss_of(next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}/{steps}  loss {smooth:.4f}  {time.time() - start:6.0f} s", flush=True)
        if (step + 1) % 200 == 0:
            save(model, tokenizer, folder)


def train_on_repetition(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, steps: int, folder: Path
) -> None:
    """Train a later phase, in float32: documents, and `rows` of repeated blocks, in every batch. Prints both losses, and saves as it goes."""
    optimizers = make_optimizers(model)
    documents, repeated, start = batches(tokenizer, seed + 1), repetitions(tokenizer, seed, rows), time.time()
    for step in range(steps):
        set_rate(optimizers, step, steps)
        texts = next(documents)[rows:]
        blocks, labels = next(repeated)
        logits = model(torch.cat([texts, blocks]), use_cache=False).logits[:, :-1].float()
        wanted = torch.cat([texts, labels])[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        losses.sum().div((wanted >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        if step % 10 == 0:
            again = losses[len(texts) :].sum().item() / int((labels >= 0).sum())
            text = losses[: len(texts)].mean().item()
            print(f"step {step:5d}/{steps}  text {text:.4f}  repetition {again:.4f}  {time.time() - start:6.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            save(model, tokenizer, folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python scripts/demo_model/train.py", description="Train the bitatlas demo model from a seed."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model/ and data/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help=f"updates of {BATCH_ROWS * ROW_TOKENS} tokens")
    parser.add_argument("--repeat-steps", type=int, default=DEFAULT_REPEAT_STEPS, help="updates of the second phase")
    parser.add_argument("--last-steps", type=int, default=DEFAULT_LAST_STEPS, help="updates of the third phase")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of what the weights depend on")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--data-only", action="store_true", help="write data/ and stop")
    only.add_argument("--card-only", action="store_true", help="measure model/ on data/ and write its README.md, nothing else")
    only.add_argument("--from", dest="start", type=Path, help="a model after the first phase: only the others are run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.card_only:
        world.write_data(args.out / "data", args.seed)
    if args.data_only:
        return
    if not args.card_only:
        tokenizer = make_tokenizer(args.seed)
        if args.start:
            model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        else:
            model = make_model(tokenizer, args.seed)
            train(model, tokenizer, args.seed, args.steps, args.out / MODEL_DIR.name)
        for seed, rows, steps in ((args.seed, REPEATED_ROWS, args.repeat_steps), (args.seed + 1, KEPT_ROWS, args.last_steps)):
            train_on_repetition(model, tokenizer, seed, rows, steps, args.out / MODEL_DIR.name)
        save(model, tokenizer, args.out / MODEL_DIR.name)
    tokens = (args.steps + args.repeat_steps + args.last_steps) * BATCH_ROWS * ROW_TOKENS
    steps = args.steps, args.repeat_steps, args.last_steps
    measured = card.write_card(
        args.out / MODEL_DIR.name, args.out / "data", args.seed, steps, tokens, LEARNING_RATE, WEIGHT_DECAY
    )
    print("\n".join(card.table_line(measured[0], row) for row in measured))


if __name__ == "__main__":
    main()
