"""lm-evaluation-harness's model class, but for what a choice's tokens are, how a model writes, and how often it reads the same tokens.

*Choices.* The harness takes as a choice's tokens those of prompt and choice together that lie beyond the prompt's own number of tokens.
Where the tokenizer merges the end of the prompt with the beginning of a choice, that drops a part of the choice, or all of it. Here all
choices of a prompt are scored from the first token in which any of them differs from the prompt's own tokens: the choices are compared
after the same beginning, and where nothing merges the tokens are the harness's.

*Writing.* Greedy, up to the task's own length. The checkpoint's generation settings (lengths, beams, penalties, sampling, tokens that are
forced, suppressed or end a text) are no part of the weights that are measured: they are put aside and put back.
A row that has met a stop, or whose answer later text cannot change, leaves its batch; the harness runs all rows until the last one stops.

*Reading.* The choices of a question share its tokens, and all questions share the examples before them. Many sequences are packed into
one row in which each distinct beginning stands once: a tree of tokens, of which each sees those it follows. No padding is read, and the
vocabulary's logits are computed where a choice is scored, nowhere else. One sequence a call is also scored as the harness does it;
where the two differ (a model that takes no mask or no positions, or looks through a window), the harness scores them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from bitatlas.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PACK_TOKENS = 256  # in a row, more where sequences are long: enough for full speed, few enough that attention costs little
PACK_TOLERANCE = 1e-4  # of a log-likelihood, between a packed sequence and the same one alone, in float32
FEW_ROWS = 4  # a step of writing costs as much for one row: below, no rows are taken out


@dataclass(frozen=True)
class Request:
    """The tokens that the model reads, and those that are scored after each of the last of them."""

    read: list[int]
    scored: list[int]


class Scorer(HFLM):  # type: ignore[misc]
    """Scores the model that it is given, on the harness's requests.

    `decided` tells whether more text cannot change what is read of an output: its row stops there.
    """

    decided: Callable[[str], bool] = staticmethod(lambda output: False)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (summed log-likelihood in nats, whether greedy decoding writes it) of each request's (prompt, choice)."""
        by_prompt: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_prompt[request.args[0]].append(index)
        encoded: list[Any] = [None] * len(requests)
        for prompt, indices in by_prompt.items():
            whole = [self.tok_encode("".join(requests[index].args)) for index in indices]
            border = min(_common(self.tok_encode(prompt), ids) for ids in whole)
            for index, ids in zip(indices, whole, strict=True):
                self._check(requests[index], ids, border)
                encoded[index] = (requests[index].args, ids[:border], ids[border:])
        return list(self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm))

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Encode as the harness does, with a tokenizer's complaint as a UserError."""
        try:
            return list(super().tok_encode(string, **options))
        except Exception as error:  # tokenizers raises bare Exceptions, like for a missing unknown-token
            raise _unreadable(error) from None

    def tok_batch_encode(self, strings: list[str], **options: Any) -> Any:
        """Encode many texts as the harness does, with a tokenizer's complaint as a UserError."""
        try:
            return super().tok_batch_encode(strings, **options)
        except Exception as error:
            raise _unreadable(error) from None

    def _check(self, request: Any, ids: Sequence[int], border: int) -> None:
        """Raise UserError for a choice that cannot be scored: the harness breaks on it."""
        where = f"--tasks {request.task_name}: a choice of item {request.doc['id']}"
        if border == 0 or border == len(ids):
            raise UserError(
                f"{where} has no tokens of its own after the question (this tokenizer merges or drops them): the task cannot be scored with it"
            )
        if len(ids) - border > self.max_length:
            raise UserError(f"{where} is longer than the model's context ({self.max_length} tokens)")

    # --- reading -----------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return what the harness's does, of packed sequences; its own where they do not stand the check."""
        # the harness's rule: what does not fit loses its beginning, and the last token is scored, not read
        inputs = [Request((prompt + choice)[-(self.max_length + 1) : -1], list(choice)) for _, prompt, choice in requests]
        longest = max(range(len(inputs)), key=lambda index: len(inputs[index].read))
        packs = _packs(inputs)
        # first the pack with the longest, which comes last in it, after tokens that it must not see
        packs.sort(key=lambda pack: longest not in pack)
        packs[0].sort(key=lambda index: index == longest)
        (alone,) = super()._loglikelihood_tokens([requests[longest]], disable_tqdm=True)
        results: dict[int, tuple[float, bool]] = {}
        for pack in packs:
            try:
                results |= zip(pack, self._score_pack([inputs[index] for index in pack]), strict=True)
            except Exception:  # models say in many ways that they take no mask, no positions or no indices of logits
                if results:
                    raise
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)  # type: ignore[no-any-return]
            if abs(results[longest][0] - alone[0]) > self._tolerance() * max(1.0, abs(alone[0])):
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)  # type: ignore[no-any-return]
        return [results[index] for index in range(len(inputs))]

    def _tolerance(self) -> float:
        return max(PACK_TOLERANCE, 2 * torch.finfo(self.model.dtype).eps)

    def _score_pack(self, pack: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return (summed log-likelihood in nats, whether greedy decoding writes it) of each request's scored tokens, in one pass."""
        tokens_in_row, positions, visible, paths = _tree([request.read for request in pack])
        scored = [path[-len(request.scored) :] for request, path in zip(pack, paths, strict=True)]
        at = sorted({place for path in scored for place in path})
        row_of = {place: row for row, place in enumerate(at)}
        dtype = self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        logits = self.model(
            input_ids=torch.tensor([tokens_in_row], device=self.device),
            position_ids=positions[None].to(self.device),
            attention_mask=mask[None, None].to(self.device),
            logits_to_keep=torch.tensor(at, device=self.device),
            use_cache=False,
        ).logits[0]  # [places scored, vocabulary]
        best, norms = logits.argmax(-1).cpu(), logits.logsumexp(-1)
        results = []
        for request, path in zip(pack, scored, strict=True):
            rows, tokens = torch.tensor([row_of[place] for place in path]), torch.tensor(request.scored)
            likelihoods = logits[rows.to(self.device), tokens.to(self.device)] - norms[rows.to(self.device)]
            results.append((float(likelihoods.sum()), bool((best[rows] == tokens).all())))
        return results

    # --- writing -----------------------------------------------------------------------------------------------------------

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Return the tokens [rows, at most max_length] of context and greedy continuation, padded from where a row stops."""
        ids, mask = context, settings["attention_mask"]
        output = torch.full((len(context), max_length), self.tokenizer.pad_token_id, device=context.device)
        rows = torch.arange(len(context), device=context.device)
        cache: dict[str, Any] = {}
        while True:
            stopping = _Stopping(self, stop, context.shape[1])
            result = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_length=max_length,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=[stopping],
                return_dict_in_generate=True,
                generation_config=GenerationConfig(),  # else transformers refuses what an old config.json says about writing
                **cache,
            )
            ids = result.sequences
            output[rows, : ids.shape[1]] = ids
            left = (~stopping.stopped).nonzero()[:, 0]
            if ids.shape[1] == max_length or not len(left):
                return output
            rows, ids = rows[left], ids[left]
            mask = torch.cat([mask[left], mask.new_ones(len(left), ids.shape[1] - mask.shape[1])], dim=1)
            cache = _cache_of(result, left)


def _tree(sequences: Sequence[Sequence[int]]) -> tuple[list[int], Tensor, Tensor, list[list[int]]]:
    """Return a row in which each distinct beginning of the sequences stands once.

    Its tokens, their positions in their sequences [tokens], what each may see, bool [tokens, tokens], and each sequence's places in the row.
    """
    places: dict[tuple[int, int], int] = {}  # (place of the token before, token): place in the row
    paths: list[list[int]] = []
    for sequence in sequences:
        path = [-1]
        for token in sequence:
            path.append(places.setdefault((path[-1], token), len(places)))
        paths.append(path[1:])
    positions, visible = torch.zeros(len(places), dtype=torch.long), torch.zeros(len(places), len(places), dtype=torch.bool)
    for path in paths:
        index = torch.tensor(path)
        positions[index] = torch.arange(len(path))
        visible[index[:, None], index] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return [token for _, token in places], positions, visible, paths


class _Stopping(StoppingCriteria):  # type: ignore[misc]
    """Tells which rows have stopped, and stops them all once a quarter has: the others go on in a smaller batch."""

    def __init__(self, scorer: Scorer, stop: Sequence[str], start: int) -> None:
        self.scorer, self.stop, self.start = scorer, stop, start
        ends = scorer.model.generation_config.eos_token_id
        self.ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.stopped = torch.tensor(False)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        texts = [self.scorer.tok_decode(row) for row in input_ids[:, self.start :].tolist()]
        by_text = [any(stop in text for stop in self.stop) or self.scorer.decided(text) for text in texts]
        ended = torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        self.stopped = self.stopped.to(input_ids.device) | ended | torch.tensor(by_text, device=input_ids.device)
        if len(texts) > FEW_ROWS and 4 * int(self.stopped.sum()) >= len(texts):
            return torch.ones_like(self.stopped)
        return self.stopped


def _cache_of(result: Any, rows: Tensor) -> dict[str, Any]:
    """Return the keys and values of some rows of what `generate` returned, by their argument's name; {} where rows cannot be taken out."""
    for name in ("cache", "past_key_values"):  # the newer and the older name
        cache = getattr(result, name, None)
        if cache is not None and hasattr(cache, "batch_select_indices"):
            cache.batch_select_indices(rows)
            return {name: cache}
    return {}


def _packs(inputs: Sequence[Request]) -> list[list[int]]:
    """Return the indices of the inputs in packs, those that begin alike next to each other.

    A pack has at most PACK_TOKENS tokens, or what two of the longest have. Only a single input is a pack of one.
    """
    limit = max(PACK_TOKENS, 2 * max(len(request.read) for request in inputs))
    packs: list[list[int]] = []
    tokens, last = limit, list[int]()
    for index in sorted(range(len(inputs)), key=lambda index: inputs[index].read):
        read = inputs[index].read
        new = len(read) - _common(last, read)
        if tokens + new > limit:
            packs.append([])
            tokens, new = 0, len(read)
        packs[-1].append(index)
        tokens, last = tokens + new, read
    if len(packs) > 1 and len(packs[-1]) == 1:
        single = packs.pop()
        packs[-1] += single
    return packs


def _unreadable(error: Exception) -> UserError:
    return UserError(f"--tasks: the model's tokenizer cannot read an item's text ({' '.join(str(error).split())[:160]})")


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@contextmanager
def greedy_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Leave the model no generation settings but the ends of text that configuration and tokenizer name; the checkpoint's own are put back afterwards."""
    config = model.config.get_text_config()
    ends = getattr(config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    ids = list(dict.fromkeys(token for token in known if token is not None))
    before = getattr(model, "generation_config", None)
    try:
        model.generation_config = GenerationConfig(eos_token_id=ids or None, bos_token_id=getattr(config, "bos_token_id", None))
        yield
    finally:
        model.generation_config = before  # type: ignore[assignment]
