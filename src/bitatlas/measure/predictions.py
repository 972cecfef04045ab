"""Keep a model's predictions in little room, and tell how far another model's are from them, token by token.

Of each prediction the `EXACT` most probable tokens are kept, and `DRAWN` of the rest, drawn with probabilities in proportion to the model's own
(systematic sampling, so that each stands for an equal part of the rest's mass). With p the model's probabilities, q the other's, R and S the
mass outside the exact ones,

    KL(p || q) = sum over the exact of p log(p/q)  +  R - S  +  sum over the rest of p g(log(p/q)),   g(x) = x + exp(-x) - 1,

since the terms of g that are not x add up to S - R. g is never negative and about x²/2, so the last sum, estimated from the drawn tokens, is small
and so is its error, which is told (`variance`). Where the other model finds tokens likely that the first does not, which hardly any draw meets,
the known mean of q/p shows it, and the plain mean of log(p/q) is taken. The most probable tokens alone would make the divergence too small: of 49,152 tokens the 512 most
probable leave 6 % of the mass of a 135 M model on an encyclopaedia, and 8 % of the divergence. A vocabulary of at most EXACT + DRAWN tokens
is kept whole, and nothing is estimated.

Eight bytes a kept token: 8 kB a prediction, where 32-bit logits of 150,000 tokens take 600.
Source: g as a control variate is the estimator "k3" of Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitatlas.model.decoder import find_layers, layers_at

EXACT, DRAWN = 512, 512
TOP = 5
SIGMAS, SMALL = 5, 5e-3  # between the drawn tokens' mean of q/p and the known one: standard errors, nats
TINY = 1e-30
COLUMNS = ("kl", "variance", "loss", "same_top", "top5")  # what is told of each prediction


@dataclass(frozen=True)
class Kept:
    """Predictions of n tokens. ids: int32 [n, kept], the `exact` most probable first, in order; log_p: float32 [n, kept]; rest: float32 [n], the mass
    outside the exact ones; loss: float32 [n], of the token that came, nats.
    """

    ids: Tensor
    log_p: Tensor
    rest: Tensor
    loss: Tensor
    exact: int

    @property
    def top(self) -> Tensor:
        """The greatest probability of each prediction, [n]."""
        return self.log_p[:, 0].exp()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file holds of it."""
        return {"ids": self.ids, "log_p": self.log_p, "rest": self.rest, "loss": self.loss}


def keep(logits: Tensor, targets: Tensor, generator: torch.Generator, exact: int = EXACT, drawn: int = DRAWN) -> Kept:
    """Return the kept part of the predictions. logits: [n, vocabulary]; targets: int64 [n], the tokens that came; generator: of the CPU."""
    log_p = torch.log_softmax(logits.float(), -1)
    loss = -log_p.gather(-1, targets.to(log_p.device)[:, None])[:, 0]
    vocabulary = log_p.shape[-1]
    exact = vocabulary if vocabulary <= exact + drawn else exact
    top, ids = log_p.topk(exact)
    rest = torch.zeros_like(loss)
    if exact < vocabulary:
        left = log_p.exp().scatter_(-1, ids, 0.0)  # [n, vocabulary]
        sums = left.cumsum(-1, dtype=torch.float64)
        total = sums[:, -1:]
        starts = torch.rand(len(log_p), 1, generator=generator, dtype=torch.float64).to(log_p.device)
        points = (torch.arange(drawn, device=log_p.device) + starts) / drawn * total
        chosen = torch.searchsorted(sums, points).clamp_max(vocabulary - 1)  # [n, drawn]
        rest = total[:, 0].float()
        ids = torch.cat([ids, chosen], -1)
        top = torch.cat([top, log_p.gather(-1, chosen)], -1)
    return Kept(ids.int().cpu(), top.cpu(), rest.cpu(), loss.cpu(), exact)


def deviate(kept: Kept, logits: Tensor, targets: Tensor) -> Tensor:
    """Return float32 [n, COLUMNS] of another model's predictions: its divergence from the kept ones, nats, with the variance of that estimate; its loss;
    whether its most probable token is theirs; how many of the five most probable it shares. logits: [n, vocabulary], at least the ids' own.
    """
    logits = logits.float()
    ids, log_p = kept.ids.long().to(logits.device), kept.log_p.to(logits.device)
    norm = logits.logsumexp(-1, keepdim=True)
    ratio = log_p - (logits.gather(-1, ids) - norm)  # log p/q, [n, kept]
    p, exact = log_p[:, : kept.exact].exp(), kept.exact
    kl = (p * ratio[:, :exact]).double().sum(-1)
    variance = torch.zeros_like(kl)
    if ids.shape[-1] > exact:
        rest = kept.rest.to(logits.device).double()
        q = (p.double() * (-ratio[:, :exact].double()).exp()).sum(-1)
        x = ratio[:, exact:].double()
        odds = (-x).exp()  # q/p, whose mean over all of the rest is known
        known = ((1 - q).clamp_min(0) / rest.clamp_min(TINY))[:, None]
        mean, spread = odds.mean(-1, keepdim=True), odds.std(-1, keepdim=True) / x.shape[-1] ** 0.5
        gap = (mean - known).abs()
        steady = (gap <= SIGMAS * spread) | (rest[:, None] * gap < SMALL)
        terms = torch.where(steady, x + odds - known, x)
        kl += rest * terms.mean(-1)
        variance = rest**2 * terms.var(-1) / x.shape[-1]
    loss = (norm - logits.gather(-1, targets.to(logits.device)[:, None]))[:, 0]
    top = logits.topk(TOP, -1).indices
    same = (top[:, 0] == ids[:, 0]).float()
    shared = (top[:, :, None] == ids[:, None, :TOP]).any(-1).sum(-1)
    return torch.stack([kl.float(), variance.float(), loss, same, shared.float()], -1).cpu()


# --- noise -----------------------------------------------------------------------------------------------------------------


@contextmanager
def rounded_layers(model: Any) -> Iterator[None]:
    """Round what every decoder layer gives to bfloat16 within the block."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        rounded = hidden.bfloat16().to(hidden.dtype)
        return rounded if isinstance(output, Tensor) else (rounded, *output[1:])

    layers = layers_at(model, find_layers(model, type(model).__name__))
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
