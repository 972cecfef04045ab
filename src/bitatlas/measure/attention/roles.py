"""Decides what a head is for: previous token, duplicate, induction or retrieval, judged against random targets at matched distances.

A role says which keys a query would look at (its *targets*). With x the token ids, q a query and k < q an earlier key:
- previous: k = q - 1, on text;
- retrieval (copy): x[k] is the token that q must predict, x[k] = x[q + 1], on text. Keys that induction would name as well
  (x[k - 1] = x[q]) are not targets, so the two roles stay apart;
- duplicate: x[k] = x[q], on repeated random tokens (a random block twice: nothing but repetition can be learned from it);
- induction: x[k - 1] = x[q], on repeated random tokens (arXiv:2209.11895).
Key 0 is a sink and never a target.

Score: kappa = (m - e) / (1 - e), with m the mean attention mass on the targets of a query and e the same for random targets, each
drawn from the keys within 8 tokens of the target it replaces (not targets themselves, not after the query, and none twice for one query:
both sums are over as many different keys). Exactly the same distance is no choice: of the previous token it would leave only that one.
Targets of retrieval are tokens that stand in the row again, so mostly frequent ones, and a head that looks at frequent tokens, whatever the
query must predict, would pass for one that retrieves. Their replacements are drawn from tokens about as frequent in the row (within a
factor of 1.5), and for that from further away (32 tokens).
p: in every sequence the true targets and the random draws are exchangeable if the role means nothing to the head; the statistic
(mean over sequences) is recomputed for random choices of one of them per sequence. That test is exact for any number of draws.
Left out: what the head writes (OV circuits); a role here is where it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEXT_ROLES = ("previous", "retrieval")
REPEATED_ROLES = ("duplicate", "induction")
ROLES = ("previous", "duplicate", "induction", "retrieval")
NEAR_TOKENS = 8  # how far from a target its random replacement may lie
NEAR_FREQUENT = 32  # how far where it must be as frequent a token
AS_FREQUENT = 1.5  # factor between counts in the row, at most
DRAWS = 16  # random sets of targets per sequence and role
KAPPA_THRESHOLDS = (0.2, 0.3, 0.4)
KAPPA_TYPED = 0.3
Q_TYPED = 0.05
BLOCK_TOKENS = (24, 32, 40, 48)  # lengths of the repeated block: with one length, a fixed distance would pass for induction
FEWEST_BLOCK_TOKENS = 8
MOST_PERMUTATIONS = 20_000
EXAMPLE_PART = 2  # the sequence of the example maps
ABLATION_PART = 1  # of the repeated sequences: those that heads are named on are part 0

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Cells = tuple[int, NDArray[np.int64], NDArray[np.int64]]  # row, and queries and keys of equal length


# --- targets and their random replacements --------------------------------------------------------------------------------


def role_targets(role: str, ids: NDArray[np.int64]) -> Bools:
    """Return the target keys of each query. ids: [tokens] -> bool [queries, keys]."""
    tokens = len(ids)
    same = ids[:, None] == ids[None, :]  # [queries, keys]
    after_same = np.zeros_like(same)  # key k stands behind a token equal to the query's
    after_same[:, 1:] = same[:, :-1]
    if role == "previous":
        targets = np.eye(tokens, k=-1, dtype=bool)
    elif role == "duplicate":
        targets = same.copy()
    elif role == "induction":
        targets = after_same
    elif role == "retrieval":
        targets = np.zeros_like(same)
        targets[:-1] = same[1:] & ~after_same[:-1]
    else:
        raise ValueError(f"role: one of {', '.join(ROLES)}, got {role!r}")
    targets &= np.tri(tokens, k=-1, dtype=bool)
    targets[:, 0] = False
    return targets


@dataclass(frozen=True)
class Pairs:
    """True (query, target) pairs of one sequence, and for each pair the random keys that replace its target."""

    query: NDArray[np.int64]  # [pairs]
    target: NDArray[np.int64]  # [pairs]
    drawn: NDArray[np.int64]  # [draws, pairs]


def matched_pairs(targets: Bools, draws: int, generator: np.random.Generator, counts: NDArray[np.int64] | None = None) -> Pairs:
    """Return the pairs of `targets` [queries, keys] with their random replacements, for each query all different keys.

    counts: [keys], how often each key's token stands in the row; with them, replacements are about as frequent as their targets.
    Pairs that have no more free keys near them than there are other targets to want these are dropped.
    """
    query, target = np.nonzero(targets)
    near = NEAR_TOKENS if counts is None else NEAR_FREQUENT
    offsets = np.concatenate([np.arange(-near, 0), np.arange(1, near + 1)])
    key = target[:, None] + offsets  # [pairs, offsets]
    inside = (key >= 1) & (key <= query[:, None])
    key = np.where(inside, key, 0)
    free = inside & ~targets[query[:, None], key]
    if counts is not None:
        ratio = counts[key] / counts[target][:, None]
        free &= (ratio <= AS_FREQUENT) & (ratio >= 1 / AS_FREQUENT)
    count = free.sum(1)
    up_to, reach = targets.cumsum(1), 2 * near  # targets of each query up to a key; how far targets may want the same key
    last = targets.shape[1] - 1
    wanting = up_to[query, np.minimum(target + reach, last)] - up_to[query, np.maximum(target - reach - 1, 0)] - 1
    enough = count > wanting
    query, target, key, free, count = query[enough], target[enough], key[enough], free[enough], count[enough]
    order = np.argsort(~free, axis=1, kind="stable")  # free offsets first
    rank = np.floor(generator.random((draws, len(query))) * count).astype(np.int64)
    drawn = key[np.arange(len(query)), order[np.arange(len(query)), rank]]  # [draws, pairs]
    if (np.diff(query) == 0).any():  # queries stand in order; with one target each, nothing can coincide
        _redraw_shared(drawn, query, key, free, targets.shape, generator)
    return Pairs(query, target, drawn)


def _redraw_shared(
    drawn: NDArray[np.int64],
    query: NDArray[np.int64],
    key: NDArray[np.int64],
    free: Bools,
    shape: tuple[int, ...],
    generator: np.random.Generator,
) -> None:
    """Draw again, in place, where a key was drawn for two pairs of one query, until none is; every round ends some and makes none.

    drawn: [draws, pairs]; query: [pairs]; key, free: [pairs, offsets], the keys near each target; shape: (queries, keys).
    """
    draws, pairs = drawn.shape
    row = np.arange(draws)[:, None] * shape[0] + query  # of a table with a line for each draw and query
    used = np.bincount((row * shape[1] + drawn).ravel(), minlength=draws * shape[0] * shape[1]).reshape(-1, shape[1])
    flat, row = drawn.reshape(-1), row.reshape(-1)
    shared = np.flatnonzero(used[row, flat] > 1)
    while len(shared):
        lines, first = np.unique(row[shared], return_index=True)
        chosen = shared[first]  # one pair of each line, so that none stands in another's way
        pair = chosen % pairs
        left = free[pair] & (used[lines[:, None], key[pair]] == 0)  # [chosen, offsets]
        rank = np.floor(generator.random(len(chosen)) * left.sum(1)).astype(np.int64)
        new = key[pair, (left.cumsum(1) > rank[:, None]).argmax(1)]
        used[lines, flat[chosen]] -= 1
        used[lines, new] += 1
        flat[chosen] = new
        shared = shared[used[row[shared], flat[shared]] > 1]


# --- masses on targets -----------------------------------------------------------------------------------------------------


@dataclass
class RoleMass:
    """Per sequence and head: mass on the true targets, and on each random draw. A role without targets in a row is NaN there."""

    roles: tuple[str, ...]
    mass: AttentionMass
    queries: NDArray[np.int64]  # [roles, rows] queries that have targets
    draws: int

    def read(self, maps: Tensor) -> Floats:
        """Return mass on targets. maps: [rows, heads, queries, keys], sinks stripped -> [rows, roles, 1 + draws, heads]; draw 0 is the true targets."""
        values = self.mass.read(maps).reshape(len(self.roles), 1 + self.draws, self.queries.shape[1], -1)
        return np.moveaxis(np.where(self.queries[:, None, :, None] > 0, values, np.nan), 2, 0)


def role_mass(roles: tuple[str, ...], ids: Tensor, first_row: int, seed: int, draws: int = DRAWS) -> RoleMass:
    """Choose a batch's targets and draws. ids: [rows, tokens]; `first_row` is its index among all rows, so the draws do not depend on the batches."""
    array = ids.cpu().numpy()
    rows, tokens = array.shape
    cells: list[Cells] = []
    weights: list[float] = []
    queries = np.zeros((len(roles), rows), dtype=np.int64)
    for index, role in enumerate(roles):
        per_row = []
        for row in range(rows):
            generator = np.random.default_rng([seed, ROLES.index(role), first_row + row])
            counts = np.bincount(array[row])[array[row]] if role == "retrieval" else None
            pairs = matched_pairs(role_targets(role, array[row]), draws, generator, counts)
            queries[index, row] = np.count_nonzero(np.diff(pairs.query, prepend=-1))
            per_row.append(pairs)
        for draw in range(1 + draws):
            cells += [(row, p.query, p.drawn[draw - 1] if draw else p.target) for row, p in enumerate(per_row)]
            weights += [1 / max(1, count) for count in queries[index]]
    return RoleMass(roles, AttentionMass((rows, tokens), cells, weights), queries, draws)


def repeated_tokens(tokenizer: Any, vocabulary: int, context: int, sequences: int, seed: int, part: int = 0) -> list[Tensor]:
    """Draw sequences of a random block twice, after the beginning token where there is one: int64 [sequences of one length, tokens] each.

    Another `part` gives other sequences. Tokens are drawn without repetition from the vocabulary without special and added tokens.
    Empty where the context cannot hold two blocks of 8 tokens or there are not 8 ordinary tokens.
    """
    ordinary, start = ordinary_tokens(tokenizer, vocabulary), _beginning(tokenizer)
    longest = min((context - len(start)) // 2, len(ordinary))
    if longest < FEWEST_BLOCK_TOKENS:
        return []
    generator = np.random.default_rng([seed, len(ROLES), part])
    groups = []
    for group, block in enumerate(BLOCK_TOKENS):
        count = len(range(group, sequences, len(BLOCK_TOKENS)))
        blocks = [generator.choice(ordinary, min(block, longest), replace=False) for _ in range(count)]
        groups.append([[*start, *tokens, *tokens] for tokens in blocks])
    return [torch.tensor(np.asarray(group, dtype=np.int64)) for group in groups if group]


def repeated_block(tokenizer: Any, vocabulary: int, block: int, seed: int) -> Tensor | None:
    """Draw one sequence for the example maps, int64 [1, tokens]; None where there are fewer than `block` ordinary tokens."""
    ordinary = ordinary_tokens(tokenizer, vocabulary)
    if len(ordinary) < block:
        return None
    tokens = np.random.default_rng([seed, len(ROLES), EXAMPLE_PART]).choice(ordinary, block, replace=False)
    return torch.tensor([[*_beginning(tokenizer), *tokens, *tokens]], dtype=torch.int64)


def _beginning(tokenizer: Any) -> list[int]:
    bos = getattr(tokenizer, "bos_token_id", None)
    return [] if bos is None else [bos]


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> NDArray[np.int64]:
    """Return the ids below `vocabulary` that are neither special nor added afterwards, in order."""
    special = set(getattr(tokenizer, "all_special_ids", [])) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    known = tokenizer.get_vocab().values()
    return np.asarray(sorted({i for i in known if i < vocabulary} - special), dtype=np.int64)


# --- scores ---------------------------------------------------------------------------------------------------------------


def kappa(mass: Floats, expected: Floats) -> Floats:
    """Return (m - e) / (1 - e): 0 is chance, 1 all mass on the targets. Same shapes in and out."""
    return (mass - expected) / np.maximum(1 - expected, 1e-6)


def permutation_p(masses: Floats, permutations: int, seed: int) -> Floats:
    """Return the one-sided p that true targets get no more mass than random ones. masses: [1 + draws, sequences, heads] -> [heads]."""
    choices, sequences, heads = masses.shape
    generator = np.random.default_rng([seed, len(ROLES) + 1])
    limit = masses[0].mean(0) - 1e-9  # equal up to rounding is equal
    reached = np.zeros(heads, dtype=np.int64)
    step = max(1, 2**22 // heads)
    for start in range(0, permutations, step):
        chosen = generator.integers(choices, size=(min(step, permutations - start), sequences))
        means = np.zeros((len(chosen), heads))
        for sequence in range(sequences):
            means += masses[chosen[:, sequence], sequence]
        reached += (means / sequences >= limit).sum(0)
    return (1 + reached) / (1 + permutations)


def permutations_for(tests: int) -> int:
    """Return enough that one head alone could pass Benjamini-Hochberg at 5 % among `tests`, up to a limit of time."""
    return int(min(MOST_PERMUTATIONS, max(1000, 20 * tests)))


def recognized(scores: dict[str, float], q_values: dict[str, float]) -> str | None:
    """Return the role with the highest kappa among those at or above 0.3 with q <= 0.05; None where there is none."""
    passing = {role: score for role, score in scores.items() if score >= KAPPA_TYPED and q_values[role] <= Q_TYPED}
    return max(passing, key=lambda role: passing[role]) if passing else None


# --- attention mass ----------------------------------------------------------------------------------------------------------


class AttentionMass:
    """Attention mass on chosen cells of a batch's maps: statistic i of `read` is weights[i] x the attention on cells[i], all different.

    The cells of all roles and random draws are gathered together, head by head. Which cells count is the same for all layers, so their
    indices are computed once a batch. A dense mask for each statistic would hold statistics x queries x keys numbers; this holds the cells.
    """

    def __init__(self, shape: tuple[int, int], cells: Sequence[Cells], weights: Sequence[float]):
        """shape: (rows, tokens) of the batch."""
        self.rows, self.tokens = shape
        lengths = np.array([len(keys) for _, _, keys in cells], dtype=np.int64)
        none = np.zeros(0, dtype=np.int64)
        self.row = torch.from_numpy(np.repeat(np.array([row for row, _, _ in cells], dtype=np.int64), lengths))
        self.index = torch.from_numpy(np.concatenate([none, *(queries * self.tokens + keys for _, queries, keys in cells)]))
        self.weights = np.asarray(weights, dtype=np.float64)
        self.filled = np.flatnonzero(lengths)  # statistics with any cell
        self.starts = (np.cumsum(lengths) - lengths)[self.filled]

    def read(self, maps: Tensor) -> Floats:
        """Return the statistics. maps: [rows, heads, queries, keys] -> float64 [statistics, heads]."""
        heads, size = maps.shape[1], self.tokens**2
        sums = np.zeros((len(self.weights), heads))
        if len(self.filled):
            flat = maps.reshape(-1)
            cells = (self.row * (heads * size) + self.index).to(maps.device)  # in the first head
            for head in range(heads):
                values = flat.take(cells).float().cpu().numpy()
                sums[self.filled, head] = np.add.reduceat(values, self.starts, dtype=np.float64)
                cells += size
        return sums * self.weights[:, None]
