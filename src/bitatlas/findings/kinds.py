"""The rule that value and down projections matter most, tested on whole kinds of modules.

What a module is for is read off its name, which differs by family. Where queries, keys and values are one module, values cannot be told
apart: the rule can then fail by its down projections, but not hold.
Left out: kinds within a layer, and roles that no family is known to name.
"""

from __future__ import annotations

from collections.abc import Sequence

from bitatlas.findings.folk import HOLDS, OPEN, at_floor, least_minus_greatest, not_tested, side_of
from bitatlas.findings.shares import LayerRows, shares_of
from bitatlas.records import Finding, Module
from bitatlas.words import interval, listed, number, percent

VALUE_AND_DOWN = "value and down projections matter most"
VALUES = {"v_proj", "value", "value_proj", "v_lin", "to_v"}
DOWNS = {
    "down_proj",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "w2",
    "lin2",
    "output_linear",
}  # Llama, GPT-NeoX, OPT, GPT-J, Mixtral, ...
DOWN_IN_MLP = {"c_proj", "output"}  # GPT-2: its attention has a c_proj as well
WITH_VALUES = {"query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "in_proj", "attn_qkv"}


def role_of(module: Module) -> str:
    """ "value", "down", "with value" (one module with queries and keys) or ""."""
    *_, parent, last = ["", *module.name.split(".")]
    if last in VALUES:
        return "value"
    if last in DOWNS or (last in DOWN_IN_MLP and ("mlp" in parent or "ff" in parent)):
        return "down"
    return "with value" if last in WITH_VALUES else ""


def value_and_down(modules: Sequence[Module], rows: LayerRows | None, seed: int = 0) -> Finding:
    """The less critical one of the two (all value projections, all down projections) against the most critical other kind: above 0.

    rows: of kinds, in the order in which they come among the modules.
    """
    if rows is None:
        return not_tested("folk", VALUE_AND_DOWN, "kinds of modules were not measured")
    kinds = list(dict.fromkeys(module.kind for module in modules))
    roles = {module.kind: role_of(module) for module in modules}
    places = {role: [place for place, kind in enumerate(kinds) if roles[kind] == role] for role in ("value", "down")}
    groups = {role: group for role, group in places.items() if group}
    others = [place for place, kind in enumerate(kinds) if roles[kind] not in groups]
    shares = shares_of(rows, seed)
    if not groups or not others:
        return not_tested("folk", VALUE_AND_DOWN, f"no kind of module is known to be one of these ({', '.join(kinds)})")
    if not shares.defined:
        return not_tested("folk", VALUE_AND_DOWN, "the low format does no more damage than the high one beyond chance")
    effect, p = least_minus_greatest(shares, list(groups.values()), [[place] for place in others])
    ratios = {role: shares.criticality(group)[0] for role, group in groups.items()}
    greatest = max(others, key=lambda place: shares.criticality([place])[0])
    chosen = [place for group in groups.values() for place in group]
    text = (
        f"Criticality of the {listed(f'{role} projections is {number(mean, 2)}' for role, mean in ratios.items())}, the greatest of all other "
        f"kinds {number(shares.criticality([greatest])[0], 2)} ({kinds[greatest]}); {'the lesser' if len(groups) == 2 else 'it'} minus that: "
        f"{interval(effect, unit=True)}. They do "
        f"{percent(shares.share(chosen)[0])} of the damage with {percent(float(rows.weights[chosen].sum() / rows.weights.sum()))} of the weights."
    )
    verdict = side_of(effect, +1)
    if len(groups) == 1:
        fused = "with value" in roles.values()
        text += (
            " Values share a module with queries and keys: not told apart."
            if fused
            else " The other of the two is not known here."
        )
        verdict = OPEN if verdict == HOLDS else verdict
    return Finding("folk", VALUE_AND_DOWN, verdict, text, effect, p, at_floor(p, shares))
