"""A two-layer model (GPT-2's own modules) whose weights are set by hand, so that every head is what it was made to be.

The residual stream has four blocks of 64: the token, its position, the token before it, and what is to be predicted. Tokens are one-hot.
Positions are pairs of cosine and sine, so that looking one back is a rotation. In layer 0 a head looks one back and copies that token,
one looks at equal tokens, one rests on the first token, one looks everywhere. In layer 1 a head looks behind the earlier equal token
(the key whose copied token is the query's) and copies it to the prediction; three look everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bitatlas.model.decoder import Decoder, decoder_of

WIDTH = 64  # of a block, of a head, and the vocabulary
TOKEN, PLACE, BEFORE, NEXT = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(4))
SHARP = 60.0  # logit of an attended key over the others, before the norm of a layer's input multiplies it
SURE = 2.0  # the same of the predicted token: a wrong one costs about ten nats
PREVIOUS, DUPLICATE, SINK, EVEN, INDUCTION = (0, 0), (0, 1), (0, 2), (0, 3), (1, 0)
CONTEXT = 128


def planted_decoder() -> Decoder:
    """The model, in float32, ready to be read."""
    config = GPT2Config(
        vocab_size=WIDTH,
        n_positions=CONTEXT,
        n_embd=4 * WIDTH,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        body = model.transformer
        body.wte.weight[:, TOKEN] = torch.eye(WIDTH)
        places, back = positions()
        body.wpe.weight[:, PLACE] = places
        one = torch.eye(WIDTH)
        scale = SHARP**0.5
        _set(body.h[0], 0, query=(PLACE, back * scale), key=(PLACE, one * scale), value=(TOKEN, one), out=BEFORE)
        _set(body.h[0], 1, query=(TOKEN, one * scale), key=(TOKEN, one * scale))
        first = places[0] / places[0].norm()
        _set(body.h[0], 2, key=(PLACE, one * scale))
        body.h[0].attn.c_attn.bias[2 * WIDTH : 3 * WIDTH] = first * scale
        centred = one - 1 / WIDTH  # without the head that fills the block, the norm leaves a constant there: no key
        _set(body.h[1], 0, query=(TOKEN, one * scale), key=(BEFORE, centred * scale), value=(TOKEN, one), out=NEXT)
        model.lm_head.weight[:, NEXT] = SURE * torch.eye(WIDTH)
    return decoder_of(model)


def positions() -> tuple[Tensor, Tensor]:
    """Codes [positions, 64] of length 1, and the matrix [64, 64] that turns each code, times it from the left, to the one before."""
    generator = torch.Generator().manual_seed(0)
    angle = 3 * torch.rand(WIDTH // 2, generator=generator)
    turns = torch.arange(CONTEXT)[:, None] * angle
    codes = torch.cat([turns.cos(), turns.sin()], dim=1) / (WIDTH // 2) ** 0.5
    cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
    return codes, torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def _set(
    layer: Any,
    head: int,
    query: tuple[slice, Tensor] | None = None,
    key: tuple[slice, Tensor] | None = None,
    value: tuple[slice, Tensor] | None = None,
    out: slice | None = None,
) -> None:
    """One head reads queries, keys and values from blocks of the stream, and writes its output to another."""
    for part, source in enumerate((query, key, value)):
        if source is not None:
            block, matrix = source
            columns = slice((part * 4 + head) * WIDTH, (part * 4 + head + 1) * WIDTH)
            layer.attn.c_attn.weight[block, columns] = matrix
    if out is not None:
        layer.attn.c_proj.weight[head * WIDTH : (head + 1) * WIDTH, out] = torch.eye(WIDTH)
