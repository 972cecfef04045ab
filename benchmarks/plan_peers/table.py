"""docs/peers.md, from the results file alone: what was compared, how, and every number in it."""

from __future__ import annotations

from typing import Any

from plan_peers.results import OURS

MEBIBYTE = 2**20

HEAD = """# Peers: who finds the better plan at equal bytes?

Made by `benchmarks/peers.py` from `benchmarks/results/{file}`; do not edit. Damage is KL(reference \\|\\| quantized) of the next-token
distribution on {test} test rows of {length} tokens that no method has seen, mean over tokens, in nats/token, with its 95 % interval by
bootstrap over rows. All methods choose between {low} and {high} for every linear module of the decoder layers (`{quantizer}` codes, nothing
fused), none may be a bit above the budget, and one meter judges them all. *bitatlas / it* is the ratio of damages on the
same rows: below 1, bitatlas's plan does less damage.
"""

WHAT = """
## What each method is

Everybody may fit on the same {fit} rows (bitatlas's {fit_only} fit and {select} select rows) of the same text. The survey has further rows of
that text for its own verdict; they choose no plan.

| method | what it does | source |
|---|---|---|
| uniform | the widest format that fits everywhere | |
| first, last layers high | whole layers raised from one end while they fit, then the largest modules that still fit | |
| random | 20 plans, filled up to the budget; *best* is chosen on the test rows themselves | |
| relative weight error | raise by what \\|\\|W - Q\\|\\|² / \\|\\|W\\|\\|² falls for a bit spent, greedily | |
| mlx-lm's gradient rule | ⟨gradient of KL at the all-low model, W_low - W_high⟩ a weight; one threshold for all modules, by bisection | mlx-lm `quant/dynamic_quant.py`, re-implemented |
| single-swap KL + knapsack | true KL of every module in every format, alone, in the unquantized model or in the all-high one; exact knapsack | |
| g²ΔW² + knapsack | empirical Fisher diagonal at the reference for HAWQ's Hessian; exact knapsack | HAWQ-V2, HAWQ-V3 |
| \\|g·ΔW\\| + knapsack | sum of \\|gradient x change\\| at the reference; exact knapsack | |
| exllamav3's greedy | true KL of raising q, k+v, o, gate+up, down of a layer in the all-low model; best gain a bit first, gains to the power 0.69 | exllamav3 `conversion/measure_model.py`, `optimize_model.py`, re-implemented |
| AutoRound AutoScheme | the tool itself: delta loss, its own dynamic programme | auto-round |
| ModelOpt auto_quantize | the tool itself, scored by gradients (linear programme) or by KL (threshold) | nvidia-modelopt |
| bitatlas | the command `bitatlas survey ... --no-fuse --tasks none`, its plan.json | |
| swap search | first improvement over all changes of one module and exchanges of two, on true KL of all fit and select rows, from the best plan of the others: about the limit | |

How the peers were fed and kept to the budget:

- AutoScheme reads texts only and drops those shorter than its window without a word. It gets each row as a text of token numbers, longer than the
  window, with a tokenizer that reads numbers, so it sees the very same tokens. Its formats are spelled `int_asym`: with plain `int` AutoRound
  keeps modules at 16 bits whose sides 32 does not divide and counts them, the output head too; the codes are the same.
- ModelOpt's integer formats are symmetric with "mse" calibration; only its choice of widths is taken. A disabled head is taken out of its
  cost model, "no quantization" is not offered, and its grouping of q/k/v and gate/up is switched off: the others have that freedom too.
- A tool whose plan is above the budget by our count is run again with its target lowered by 0.02 bits until it fits. mlx-lm's bisection may
  end above its target; then the tighter end of its last bracket is taken. Remarks below say where that happened.
- What a rule leaves unspent stays unspent.

Times are those of one run on {cores} cores: *search* is the rule alone with the model loaded and quantized (for the tools: their call), *process* the whole
process with imports and loading. bitatlas's process is the whole survey with its screens, profiles and report; its search is that less
the stages that the survey's log names and that look for no plan: imports and loading are in it. Peak memory is the process's. Versions: {versions}.

## Running it again

```
make bench                                               # everything; environments for the two tools are made on first use
python benchmarks/peers.py --methods mlx,exllamav3 --checkpoints demo --code-bits 2.5
python benchmarks/peers.py --again --methods bitatlas    # after a change
python benchmarks/peers.py --search-seconds 600          # with the practical limit
python benchmarks/peers.py --table-only
```

A run goes on where the last one stopped; finished entries are measured again only with `--again`. `--quantizer` is handed to
bitatlas and to the judge; give another `--results` file with it.
"""


def render(content: dict[str, Any], order: list[str], file: str) -> str:
    """The page. order: labels from top to bottom; file: the name of the results file."""
    settings = content["settings"]
    rows = settings["rows"]
    low, high = settings["formats"]
    parts = [
        HEAD.format(
            file=file, test=rows["test"], length=settings["row_length"], low=low, high=high, quantizer=settings["quantizer"]
        ),
        together_table(content, order),
    ]
    parts += [cell_table(key, cell, order) for key, cell in content["cells"].items()]
    parts.append(
        WHAT.format(
            fit=rows["fit"] + rows["select"],
            fit_only=rows["fit"],
            select=rows["select"],
            cores=content["machine"].get("cores", "?"),
            versions=versions(content),
        )
    )
    return "\n".join(parts)


def versions(content: dict[str, Any]) -> str:
    """Of this project's environment, and of the tools that ran in their own."""
    found = dict(content.get("versions", {}))
    for cell in content["cells"].values():
        for entry in cell["methods"].values():
            own = entry.get("versions", {})
            found |= {name: text for name, text in own.items() if name not in found}
    return ", ".join(f"{name} {text}" for name, text in found.items())


def together_table(content: dict[str, Any], order: list[str]) -> str:
    """Geometric means over cells."""
    found = content["together"]
    lines = ["\n## All together\n", "Geometric mean over checkpoints and budgets of bitatlas's damage divided by the method's.\n"]
    lines += ["| method | bitatlas / it | 95 % interval | cells |", "|---|---:|---|---:|"]
    for label in order:
        if label in found:
            one = found[label]
            lines.append(
                f"| {escaped(label)} | {one['geometric_mean_ratio']:.3f} | {interval(one['ci95'])} | {len(one['cells'])} |"
            )
    return "\n".join(lines) + "\n"


def cell_table(key: str, cell: dict[str, Any], order: list[str]) -> str:
    """One checkpoint at one budget, and the remarks on it."""
    lines = [f"\n## {cell['checkpoint']}, at most {cell['code_bits']:g} code bits\n"]
    lines += [
        "| method | damage | 95 % interval | more than bitatlas | bitatlas / it | code bits | bytes | search, s | process, s | peak, MiB |",
        "|---|---:|---|---|---|---:|---:|---:|---:|---:|",
    ]
    remarks = []
    for label in order:
        if label not in cell["methods"]:
            continue
        entry = cell["methods"][label]
        lines.append(method_line(label, entry))
        remarks += [f"- {escaped(label)}: {escaped(remark)}." for remark in entry.get("remarks", [])]
    return "\n".join([*lines, "", *remarks])


def method_line(label: str, entry: dict[str, Any]) -> str:
    """One row of a cell's table."""
    name = f"**{label}**" if label == OURS else escaped(label)
    if "not_run" in entry:
        return f"| {name} | not run: {escaped(entry['not_run'])} |" + " |" * 8
    more, ratio = entry.get("more_than_ours_nats"), entry.get("ours_to_it")
    compared = ["", ""]
    if more and ratio and label != OURS:
        compared = [f"{more['mean']:+.4f} ({interval(more['ci95'], 4)})", f"{ratio['ratio']:.3f} ({interval(ratio['ci95'])})"]
    return (
        f"| {name} | {entry['damage_nats']:.4f} | {interval(entry['ci95'], 4)} | {compared[0]} | {compared[1]} "
        f"| {entry['code_bits']:.4f} | {entry['quantized_bytes']:,} | {seconds(entry['search_seconds'])} "
        f"| {seconds(entry['process_seconds'])} | {entry['peak_bytes'] / MEBIBYTE:.0f} |"
    )


def interval(ends: list[float], digits: int = 3) -> str:
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 0.05 else "<0.1"


def escaped(text: str) -> str:
    """Vertical bars would end a cell."""
    return text.replace("|", "\\|")
