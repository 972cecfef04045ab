"""The method of bitatlas in one file: which parts of a language model can go to 2 bits, and is the plan better than a guess?

    python examples/nano_atlas.py                                                    # the bundled demo, about a minute
    python examples/nano_atlas.py ./my-model --tokens my-text.txt --code-bits 3

Read it from top to bottom: a text in rows, rounding to nearest, damage, damage of single swaps at two bases, knapsacks, and a
verdict on rows that the plan has not seen. It takes nothing from the package, and gives the package's numbers (tests/test_nano_atlas.py).
Left out, and in the package: other quantizers and formats, search with interactions, tasks, streaming, resuming, reports.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist

import torch
import transformers
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[1] / "src" / "bitatlas" / "data"
WIDTHS = (2, 3, 4)  # bits of a code, narrowest first
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
CLIPPING = [1 - 0.5 * step / 20 for step in range(20)]  # of a group's range: 1 down to 0.525


def refuse(message: str) -> None:
    """Say in one line what is wrong, and end with exit code 2."""
    print("nano_atlas:", " ".join(message.split())[:300], file=sys.stderr)
    sys.exit(2)


# --- 1. A checkpoint, and a text in rows: fit rows find plans, select rows choose one, test rows judge it --------------
def load_checkpoint(folder: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Return the model in float32, ready to be measured, and its tokenizer."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        refuse(f"{folder}: not a model (give a folder with config.json, safetensors weights and a tokenizer)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # each kind of broken folder raises its own
        refuse(f"{folder}: transformers cannot load it ({error})")
    if report["missing_keys"] or report["mismatched_keys"] or hasattr(model.config, "quantization_config"):
        refuse(f"{folder}: its weights are not those of its config, or quantized already")
    return model.eval().requires_grad_(False), tokenizer


def cut_rows(text: str, tokenizer, counts: list[int], length: int) -> list[Tensor]:
    """Return fit, select and test rows, int64 [rows, length] each, spread over the first, second and last third of `text`.

    Thirds, not a shuffle: neighbours come from one document, and a plan fitted on the one would know the other.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = list(dict.fromkeys(tuple(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)))  # each once, in order
    runs = [slice(i, i + 32) for i in range(max(1, length - 31))]  # no 32 tokens in a row come in two sets
    parts, known = [], set()
    for number, count in enumerate(counts):
        part = rows[number * len(rows) // len(counts) : (number + 1) * len(rows) // len(counts)]
        unseen = [row for row in part if known.isdisjoint(row[run] for run in runs)]
        if len(unseen) < count:
            refuse(f"text too short: a third of it holds {len(unseen)} new rows of {length} tokens, not {count}")
        parts.append(torch.tensor([unseen[i * len(unseen) // count] for i in range(count)]))
        known |= {tuple(row[run]) for row in parts[-1].tolist() for run in runs}
    return parts


# --- 2. Round to nearest ------------------------------------------------------------------------------------------------
def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [out, in], scale float16 [out, groups] and zero-point uint8 [out, groups] of `weight` [out, in].

    A group of inputs shares a scale and a zero-point: weight = (code - zero) * scale. Its range is shrunk step by step, since
    clipping the extremes leaves finer steps for all others; the step of least squared error wins.
    """
    top = 2**bits - 1  # the greatest code
    # A short last group is filled up with zeros: 0 is in every range and always a code, so they change neither grid nor error
    filled = nn.functional.pad(weight.float(), (0, -weight.shape[1] % group_size))
    groups = filled.unflatten(1, (-1, group_size))  # [out, groups, group_size]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)  # [out, groups, 1]
    least, scale, zero = torch.full_like(low, math.inf), torch.empty_like(low), torch.empty_like(low)  # of the best step so far
    for kept in CLIPPING:
        new_scale = ((high - low) * kept / top).clamp(min=2**-24).half().float()  # a float16 is stored, at least the smallest
        new_zero = (-low * kept / new_scale).round().clamp(0, top)
        codes = ((groups / new_scale).round() + new_zero).clamp(0, top)  # [out, groups, group_size]
        error = ((codes - new_zero) * new_scale - groups).square().sum(-1, keepdim=True)  # [out, groups, 1]
        better = error < least
        updates = (error, least), (new_scale, scale), (new_zero, zero)
        least, scale, zero = (torch.where(better, new, old) for new, old in updates)
    codes = ((groups / scale).round() + zero).clamp(0, top).flatten(1)[:, : weight.shape[1]]
    return codes.to(torch.uint8), scale.squeeze(-1).half(), zero.squeeze(-1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """Return the weight float32 [out, in] that the codes stand for."""
    scale, zero = (each.float().repeat_interleave(group_size, 1)[:, : codes.shape[1]] for each in (scale, zero))
    return (codes.float() - zero) * scale


def stored_bytes(shape: tuple[int, int], bits: int, group_size: int) -> int:
    """Return the exact bytes of a weight [out, in]: codes as a stream of bits, and 16 bits of scale and 16 of zero-point a group."""
    out_features, in_features = shape
    return math.ceil(out_features * in_features * bits / 8) + 4 * out_features * math.ceil(in_features / group_size)


@dataclass
class Unit:
    """Modules of one layer that get one width, since runtimes make one matrix of them: q/k/v, gate/up; others alone."""

    name: str
    layer: int
    modules: list[nn.Linear]
    weights: int  # how many
    quantized: dict[int, list[Tensor]]  # width -> weights of the modules, [out, in] each
    size: dict[int, int]  # width -> bytes


def quantized_units(model: nn.Module, group_size: int) -> list[Unit]:
    """Return the units of the decoder layers (the list of blocks with most weights), in order, quantized at every width."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    path = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()), default="")
    units: dict[str, Unit] = {}
    for name, module in model.named_modules():
        if path and name.startswith(f"{path}.") and isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            key = f"{parent}.{FUSED.get(last, last)}"
            unit = units.setdefault(key, Unit(key, int(name[len(path) + 1 :].partition(".")[0]), [], 0, {}, {}))
            unit.modules.append(module)
            unit.weights += module.weight.numel()
    for unit in units.values():
        for bits in WIDTHS:
            unit.quantized[bits] = [dequantize(*quantize(m.weight, bits, group_size), group_size) for m in unit.modules]
            unit.size[bits] = sum(stored_bytes(m.weight.shape, bits, group_size) for m in unit.modules)
    return list(units.values()) or refuse("the model has no decoder layers with linear modules: nothing to quantize")


# --- 3. Damage ----------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the model's next-token log-probabilities, float32 [rows, tokens, vocabulary]."""
    batch = max(1, 2**24 // (rows.shape[1] * model.config.vocab_size))  # rows at a time: some 2**24 logits
    return torch.cat([model(part).logits.float().log_softmax(-1) for part in rows.split(batch)])


def damage(model: nn.Module, units: list[Unit], rows: Tensor, reference: Tensor, plan: tuple[int, ...]) -> Tensor:
    """Return KL(reference || model with unit u at plan[u] bits), mean over each row's tokens: float64 [rows], nats/token.

    reference: `log_probabilities` of the model before this was first called, as the model is left with the plan's weights.
    """
    for unit, bits in zip(units, plan, strict=True):
        for module, weight in zip(unit.modules, unit.quantized[bits], strict=True):
            module.weight.data = weight  # exchanged, not copied: another plan costs nothing
    changed = log_probabilities(model, rows)  # [rows, tokens, vocabulary]
    kl = nn.functional.kl_div(changed, reference, reduction="none", log_target=True).sum(-1).double().mean(-1)
    return kl if kl.isfinite().all() else refuse("the model's logits are not finite numbers")


# --- 4. Which units do it: single swaps at two bases --------------------------------------------------------------------
def single_swaps(measure, base: int, units: int) -> Tensor:
    """Return the damage with every unit at `base` bits but one at each width: float64 [units, widths, rows], nats/token."""
    plans = [(base,) * unit + (bits,) + (base,) * (units - unit - 1) for unit in range(units) for bits in WIDTHS]
    return torch.stack([measure(plan) for plan in plans]).unflatten(0, (units, len(WIDTHS)))


def unit_values(around_high: Tensor, around_low: Tensor) -> dict[str, Tensor]:
    """Return three tables of what each unit does to the damage at each width, 0 at the widest: [units, widths, rows] each.

    Damages interact: a 2-bit unit does one thing in a good model, another in a bad one. Let the damage of narrow units S be
    sum of a_u over S + sum of q_uv over pairs in S. The first unit to go narrow adds a_u, the last a_u + sum_v q_uv. The mean of both
    is the unit's Shapley value: each interaction is shared by its two units, and the values sum to the whole damage.
    """
    first, last = around_high - around_high[:, -1:], around_low - around_low[:, -1:]
    return {"others wide": first, "others narrow": last, "mean of both": (first + last) / 2}


# --- 5. A plan under a budget -------------------------------------------------------------------------------------------
def knapsack(values: list[list[float]], cost: list[list[int]], limit: int) -> tuple[int, ...]:
    """Return each unit's column: the least sum of `values` whose summed `cost` is at most `limit`, both [units][columns]. Exact.

    A dynamic programme over the units. A state is what was spent so far, with the least damage for it; one that costs more than
    another and does no less damage is dropped, since whatever follows, the other ends no worse.
    """
    states = {0: (0.0, ())}  # spent -> (damage, columns so far)
    for unit, prices in enumerate(cost):
        room = limit - sum(min(later) for later in cost[unit + 1 :])  # leave what the others need at least
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (harm, columns) in states.items():
            for column, price in enumerate(prices):
                state = (harm + values[unit][column], (*columns, column))
                if spent + price <= room and state < grown.get(spent + price, (math.inf, ())):
                    grown[spent + price] = state
        states, least = {}, math.inf
        for spent in sorted(grown):
            if grown[spent][0] < least:
                states[spent], least = grown[spent], grown[spent][0]
    return min(states.values())[1]


# --- 6. Was it worth it? ------------------------------------------------------------------------------------------------
def simple_plans(units: list[Unit], limit: int) -> dict[str, tuple[int, ...]]:
    """Return plans of at most `limit` bits of codes that need no measuring: name -> width of every unit."""
    weights = sum(unit.weights for unit in units)
    widest = max(bits for bits in WIDTHS if bits * weights <= limit)
    plans = {f"uniform {widest} bits": (widest,) * len(units)}
    for name, order in (("first layers high", range(len(units))), ("last layers high", range(len(units))[::-1])):
        plan, room = [WIDTHS[0]] * len(units), limit - WIDTHS[0] * weights
        for unit in order:  # while there is room, so that a measured plan does not win by being larger
            if (extra := (WIDTHS[-1] - WIDTHS[0]) * units[unit].weights) <= room:
                plan[unit], room = WIDTHS[-1], room - extra
        plans[name] = tuple(plan)
    return plans


def interval(values: Tensor, statistic=lambda means: means) -> list[float]:
    """Return the 95 % bootstrap interval [low, high] of a statistic of means over rows: values [rows, ...], drawn by whole rows."""
    n, v, z = len(values), len(values) - 1, NormalDist().inv_cdf(0.025)
    draws = torch.randint(n, (10_000, n), generator=torch.Generator().manual_seed(0))
    resampled = statistic(values[draws].mean(1))  # [10,000]
    # Percentiles are too narrow for few rows: they are taken as much further out as Student's t is (arXiv:1411.5279)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)  # its quantile (Cornish and Fisher)
    tail = NormalDist().cdf(t * math.sqrt(n / v))
    return resampled.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()


def verdict(plan: Tensor, other: Tensor) -> tuple[str, float, float, float]:
    """Return the word, and the mean of plan - other with its 95 % interval; both are damage on the same rows, [rows], nats/token."""
    difference = plan - other  # what makes a row hard for both falls out
    low, high = interval(difference)
    word = "better" if high < 0 else "worse" if low > 0 else "no worse shown"
    return word, difference.mean().item(), low, high


# --- 7. All together ----------------------------------------------------------------------------------------------------
def print_layers(units: list[Unit], values: Tensor, whole: Tensor, plan: tuple[int, ...]) -> None:
    """values: of each unit narrow, [units, rows]; whole: damage of all narrow minus that of all wide, [rows]; nats/token."""
    print("layer  share of damage  criticality [95 %]    bits")
    for layer in sorted({unit.layer for unit in units}):
        mine = [index for index, unit in enumerate(units) if unit.layer == layer]
        weight_share = sum(units[index].weights for index in mine) / sum(unit.weights for unit in units)
        both = torch.stack([values[mine].sum(0) / weight_share, whole], dim=1)  # [rows, 2], resampled together
        low, high = interval(both, lambda means: means[:, 0] / means[:, 1])
        criticality = both[:, 0].mean() / both[:, 1].mean()
        line = f"{layer:5}  {criticality * weight_share:15.1%}  {criticality:5.2f} [{low:.2f}, {high:.2f}]".ljust(46)
        print(line + ", ".join(f"{units[index].name.rpartition('.')[2]} {plan[index]}" for index in mine))
    print(f"  sum  {values.sum(0).mean() / whole.mean():15.1%}  (100 % where damage is quadratic in the units)\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan 2, 3 and 4 bits for a language model, and judge the plan.")
    parser.error = refuse
    parser.add_argument("model", nargs="?", default=str(DEMO / "bitatlas-demo"), metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--tokens", default=str(DEMO / "demo_data" / "text.txt"), metavar="FILE", help="text in UTF-8")
    parser.add_argument("--code-bits", type=float, default=3.0, help="budget: mean bits of a code")
    parser.add_argument("--group-size", type=int, default=64, help="inputs that share a scale")
    parser.add_argument("--rows", type=int, nargs=3, default=(8, 16, 64), metavar=("FIT", "SELECT", "TEST"))
    parser.add_argument("--row-length", type=int, default=128, help="tokens")
    options = parser.parse_args(arguments)
    if not WIDTHS[0] <= options.code_bits <= WIDTHS[-1]:
        refuse(f"--code-bits {options.code_bits:g}: from {WIDTHS[0]} to {WIDTHS[-1]}")
    if min(options.group_size, options.row_length, *options.rows) < 2:
        refuse("--group-size, --row-length and --rows: at least 2")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        text = Path(options.tokens).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"--tokens {options.tokens}: not a text file in UTF-8 ({error})")
    model, tokenizer = load_checkpoint(options.model)
    if options.row_length > (context := getattr(model.config, "max_position_embeddings", math.inf)):
        refuse(f"--row-length {options.row_length}: the model's context is {context} tokens")
    sets = cut_rows(text, tokenizer, options.rows, options.row_length)
    if max(rows.max() for rows in sets) >= model.config.vocab_size:
        refuse(f"{options.model}: its tokenizer gives tokens that the model does not have")
    units = quantized_units(model, options.group_size)
    on_fit, on_select, on_test = (cache(partial(damage, model, units, rows, log_probabilities(model, rows))) for rows in sets)
    around_high, around_low = (single_swaps(on_fit, base, len(units)) for base in (WIDTHS[-1], WIDTHS[0]))
    tables = unit_values(around_high, around_low)  # [units, widths, rows]
    limit = int(options.code_bits * (weights := sum(unit.weights for unit in units)))  # bits
    cost = [[bits * unit.weights for bits in WIDTHS] for unit in units]
    plans = {name: tuple(WIDTHS[k] for k in knapsack(table.mean(-1).tolist(), cost, limit)) for name, table in tables.items()}
    best = min(plans, key=lambda name: on_select(plans[name]).mean())  # which table misleads least differs from model to model
    print_layers(units, tables["mean of both"][:, 0], around_low[0, 0] - around_high[0, -1], plans[best])
    print(f"The plan: of three, that of the scores {best!r} does least damage on select rows. On test rows, nats/token:\n")
    print("                   code bits       bytes      damage  plan minus this [95 %]")
    for name, other in {"the plan": plans[best], **simple_plans(units, limit)}.items():
        bits = sum(width * unit.weights for unit, width in zip(units, other, strict=True)) / weights
        size = sum(unit.size[width] for unit, width in zip(units, other, strict=True))
        word, difference, low, high = verdict(on_test(plans[best]), on_test(other))
        compared = f"  {difference:+.4f} [{low:+.4f}, {high:+.4f}]: {word}" if name != "the plan" else ""
        print(f"{name:18} {bits:9.3f} {size:11,} {on_test(other).mean():11.4f}{compared}")


if __name__ == "__main__":
    main()
