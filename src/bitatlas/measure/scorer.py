"""lm-evaluation-harness's model class, but for two things: what a choice's tokens are, and how a model writes.

*Choices.* The harness takes as a choice's tokens those of prompt and choice together that lie beyond the prompt's own number of tokens.
Where the tokenizer merges the end of the prompt with the beginning of a choice, that drops a part of the choice, or all of it. Here all
choices of a prompt are scored from the first token in which any of them differs from the prompt's own tokens: the choices are compared
after the same beginning, and where nothing merges the tokens are the harness's.

*Writing.* Greedy, up to the task's own length. The checkpoint's generation settings (lengths, beams, penalties, sampling, tokens that are
forced, suppressed or end a text) are no part of the weights that are measured: they are put aside and put back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from bitatlas.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scorer(HFLM):  # type: ignore[misc]
    """Scores the model that it is given, on the harness's requests."""

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

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        settings["generation_config"] = GenerationConfig()  # else transformers refuses what an old config.json says about writing
        return super()._model_generate(context, max_length, stop, **settings)


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
