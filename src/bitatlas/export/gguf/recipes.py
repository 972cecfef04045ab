"""llama.cpp's own recipes: which type llama-quantize gives to which tensor under a name like Q4_K_M. What a plan has to beat.

The rules are retold from its source (`llama-quant.cpp`, v0.5): what a name starts from, which tensors get more, in which layers, and what stands
in for a type whose blocks do not divide a row. The tests compare them with `llama_model_quantize` itself.
Left out: recipes for ternary models, MXFP4, and those of one or two bits that nobody has asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bitatlas.errors import UserError
from bitatlas.export.gguf.names import gguf_architecture
from bitatlas.model.checkpoint import Checkpoint
from bitatlas.records.formats import FORMATS, LLAMA_CPP_BLOCKS

OFFERED = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_M", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
BASES = {  # name -> the type that a tensor without a rule of its own gets
    "IQ2_XXS": "iq2_xxs", "IQ2_XS": "iq2_xs", "IQ2_S": "iq2_xs", "IQ2_M": "iq2_s", "Q2_K": "q2_k", "Q2_K_S": "q2_k",
    "IQ3_XXS": "iq3_xxs", "IQ3_XS": "iq3_s", "IQ3_S": "iq3_s", "IQ3_M": "iq3_s", "Q3_K_S": "q3_k", "Q3_K_M": "q3_k", "Q3_K_L": "q3_k",
    "IQ4_XS": "iq4_xs", "IQ4_NL": "iq4_nl", "Q4_0": "q4_0", "Q4_K_S": "q4_k", "Q4_K_M": "q4_k", "Q5_0": "q5_0", "Q5_K_S": "q5_k", "Q5_K_M": "q5_k",
    "Q6_K": "q6_k", "Q8_0": "q8_0",
}  # fmt: skip
STAND_INS = {  # of a type with blocks of 256, in rows that they do not divide
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip
LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # with rules of their own
KINDS = (  # part of a tensor's name -> what the rules know it as
    ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "kv_b"), ("attn_v.weight", "v"), ("attn_k.weight", "k"), ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"), ("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down"),
)  # fmt: skip
NEED_IMATRIX = (*LOW, "IQ3_XXS", "IQ3_XS", "Q2_K_S")  # which llama-quantize refuses without an importance matrix
LIKE_V = ("v", "qkv", "kv_b")


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model."""

    architecture: str  # llama.cpp's name of it
    layers: int
    heads_per_kv: int  # query heads that share a key
    experts: int = 0

    @property
    def is_70b(self) -> bool:
        return self.architecture == "llama" and self.layers == 80 and self.heads_per_kv > 1


def recipes_of(checkpoint: Checkpoint, names: Mapping[str, str], imatrix: bool) -> dict[str, dict[str, str]]:
    """Return recipe -> planned module -> format, of the recipes that every planned module can follow.

    names: module -> the GGUF's tensor that it is in; without one for every planned module, or an architecture of llama.cpp's: {}.
    """
    config, info = checkpoint.config.get_text_config(), checkpoint.info
    planned = {module.name for module in checkpoint.modules}
    modules = {module.name: module for module in (*checkpoint.modules, *checkpoint.outer) if module.name in names}
    try:
        architecture = gguf_architecture(checkpoint.config.model_type)
    except UserError:
        return {}
    if not planned <= set(modules):
        return {}
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    facts = ModelFacts(
        architecture, info.layers, heads // int(getattr(config, "num_key_value_heads", None) or heads), int(experts)
    )
    widths = {names[name]: module.shape[1] for name, module in modules.items()}
    recipes = {}
    for recipe in OFFERED:
        if recipe in NEED_IMATRIX and not imatrix:
            continue
        types = types_of(recipe, widths, facts, imatrix)
        assignment = {module: types[names[module]] for module in planned}
        if all(kind in FORMATS and FORMATS[kind].runtime for kind in assignment.values()):
            recipes[recipe] = assignment
    return recipes


def types_of(recipe: str, widths: Mapping[str, int], facts: ModelFacts, imatrix: bool = True) -> dict[str, str]:
    """Return tensor -> type, "f16" where none fits. widths: tensor that is quantized -> length of its rows. KeyError for an unknown recipe."""
    tied = "output.weight" not in widths
    counts = {"v": 0, "down": 0, "gate": 0, "up": 0}
    values = sum(kind_of(name) in LIKE_V for name in widths)
    types = {}
    for name in sorted(widths, key=_order):
        kind = kind_of(name)
        counter = "v" if kind in LIKE_V else kind
        number = counts.get(counter, 0)
        if counter in counts:
            counts[counter] += 1
        layer = _layer(name) if facts.experts > 1 and counter in ("down", "gate", "up") else number
        if kind == "output" or (kind == "embedding" and tied):
            kind_type = _head(recipe, widths[name], facts)
        else:
            kind_type = _rule(recipe, kind, _Place(layer, values if counter == "v" else facts.layers), facts, imatrix)
        types[name] = _fitting(kind_type, widths[name])
    return types


def kind_of(name: str) -> str:
    """Return what the rules know a tensor as; "other" for none of them."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((kind for part, kind in KINDS if part in name), "other")


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _order(name: str) -> tuple[int, str]:
    return _layer(name), name


def _fitting(name: str, width: int) -> str:
    if width % LLAMA_CPP_BLOCKS[name][1] == 0:
        return name
    other = STAND_INS.get(name, "")
    return other if other and width % LLAMA_CPP_BLOCKS[other][1] == 0 else "f16"


def _head(recipe: str, width: int, facts: ModelFacts) -> str:
    """Return the type of the head, or of an embedding that is one, too."""
    base = BASES[recipe]
    if facts.architecture == "falcon" or width % LLAMA_CPP_BLOCKS[base][1]:
        return "q8_0"
    if recipe in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "q5_k"
    return base if base == "q8_0" else "q6_k"


@dataclass(frozen=True)
class _Place:
    """Which of the tensors of its kind it is, and of how many."""

    index: int
    count: int

    @property
    def is_early(self) -> bool:
        return self.index < self.count // 8

    @property
    def gets_more(self) -> bool:
        """Return whether it is among the first or last eighth, or each third in between."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


Rule = Callable[[str, _Place, ModelFacts, bool], str | None]


def _rule(recipe: str, kind: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str:
    if kind == "embedding":
        return {"IQ2_XXS": "q2_k", "IQ2_XS": "q2_k", "IQ2_S": "iq3_s", "IQ2_M": "iq3_s", "IQ3_XXS": "iq3_s"}.get(
            recipe, BASES[recipe]
        )
    if recipe in LOW:
        return _low(recipe, kind, place, facts) or BASES[recipe]
    rule = _value if kind in LIKE_V else RULES.get(kind)
    return (rule and rule(recipe, place, facts, imatrix)) or BASES[recipe]


def _low(recipe: str, kind: str, place: _Place, facts: ModelFacts) -> str | None:
    wider = "iq3_s" if recipe in ("IQ2_S", "IQ2_M") else "q2_k"
    if kind in LIKE_V:
        return "q4_k" if facts.heads_per_kv >= 4 or facts.experts >= 4 else wider
    if kind == "k" and facts.experts == 8:
        return "q4_k"
    if kind == "down" and place.is_early:
        return wider
    if kind == "attn_output":
        return "q5_k" if facts.experts == 8 else "iq3_s" if wider == "iq3_s" else None
    return None


def _value(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    shared = facts.heads_per_kv >= 4
    kind = {
        "Q2_K": "q4_k" if shared else "q3_k",
        "Q2_K_S": "q4_k" if shared else None,
        "IQ3_XXS": "q4_k" if shared else "iq3_xxs" if imatrix else "iq3_s",
        "IQ3_XS": "q4_k" if shared else None,
        "IQ3_S": "q4_k" if shared else None,
        "IQ3_M": "q4_k",
        "Q3_K_M": "q5_k" if place.index < 2 else "q4_k",
        "Q3_K_L": "q5_k",
        "IQ4_NL": "q5_k" if shared else None,
        "IQ4_XS": "q5_k" if shared else None,
        "Q4_K_M": "q6_k" if place.gets_more else None,
        "Q5_K_M": "q6_k" if place.gets_more else None,
        "Q4_K_S": "q5_k" if place.index < 4 else None,
    }.get(recipe)
    if facts.is_70b and (kind or BASES[recipe]) in ("q3_k", "q4_k"):
        kind = "q5_k"
    return "q8_0" if facts.experts == 8 else kind


def _key(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    return "q8_0" if facts.experts == 8 else _query(recipe, place, facts, imatrix)


def _query(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    return {"IQ3_XS": "iq3_xxs", "IQ3_XXS": "iq2_s"}.get(recipe)


def _down(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    is_falcon = facts.architecture == "falcon"
    first = place.index < place.count // 16
    more = place.gets_more
    kind: str | None = None
    if recipe == "Q2_K":
        kind = "q3_k"
    elif recipe == "Q2_K_S":
        kind = "q4_k" if place.is_early else None
    elif recipe == "IQ3_XXS" and not imatrix:
        kind = "q4_k" if place.is_early else "q3_k"
    elif recipe == "Q3_K_M":
        kind = "q5_k" if first else "q4_k" if more or not is_falcon else "q3_k"
    elif recipe == "IQ3_M" and (place.is_early or (facts.experts == 8 and more)):
        kind = "q4_k"
    elif recipe == "Q3_K_L":
        kind = "q4_k" if is_falcon else "q5_k"
    elif recipe == "Q4_K_M":
        kind = ("q6_k" if first else "q5_k" if more else "q4_k") if is_falcon else "q6_k" if more else None
    elif recipe in ("IQ4_NL", "IQ4_XS") and place.is_early and not imatrix:
        kind = "q5_k"
    elif recipe == "Q5_K_M":
        kind = "q6_k" if more else None
    elif recipe == "Q4_K_S" and place.is_early and not is_falcon:
        kind = "q5_k"
    elif recipe in ("Q4_0", "Q5_0") and imatrix and place.is_early:
        kind = recipe.lower().replace("_0", "_1")
    return kind


WITH_EIGHT_EXPERTS = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip


def _attention_output(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    if facts.architecture == "falcon":
        return "q4_k" if recipe == "Q3_K_L" else None
    if facts.experts == 8:
        return "q5_k" if recipe in WITH_EIGHT_EXPERTS else None
    return {"Q2_K": "q3_k", "IQ3_XXS": "iq3_s", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k", "IQ3_M": "q4_k"}.get(recipe)


def _gate_or_up(recipe: str, place: _Place, facts: ModelFacts, imatrix: bool) -> str | None:
    middle = not place.is_early and place.index < 7 * place.count // 8
    return "iq3_xxs" if recipe == "IQ3_XS" and middle else None


RULES: dict[str, Rule] = {
    "k": _key,
    "q": _query,
    "down": _down,
    "attn_output": _attention_output,
    "gate": _gate_or_up,
    "up": _gate_or_up,
}
