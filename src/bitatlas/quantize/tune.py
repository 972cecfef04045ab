"""Tune the scales of a finished plan's codes on the reference's own predictions, by gradient descent.

Quantizers look at one module at a time. Here all modules are changed together, so that the next-token distribution of the whole quantized
model comes nearer to the reference's: the loss is the damage itself, KL(reference || quantized), on rows of the fit text. Every group's scale
becomes s (1 + t), and t is trained; codes and zero-points stay, so the bytes do, too.

Adam; a weight's gradient is turned into those of its scales as soon as it is there, and dropped. At the marks, a few times a run, the model is
measured on the select rows; the best of them is what comes out, the scales as they were where no mark is better. Early marks say little, as rates
are high then. A run that was interrupted goes on from its last mark and ends in the same bytes.

Tried and left out: codes that may flip (latents with straight-through gradients, from the codes or from the reference's weights on: at the same
number of steps never better than scales alone, and worse where many flip); codes fitted once more to the inputs that the quantized layers before
give (2 bits: 5 % less damage before tuning, none after it; 3 bits: more); norms (3 % less damage; files for runtimes take them from the
checkpoint).

Of a streamed model (see `streaming`) a step runs layer by layer: forwards, then backwards with each layer run once more from what went into it, so
that one layer's weights and gradients are in memory at a time. Both ways give the same gradients, but for the order of sums.
Source: a student trained on its teacher's distribution: Hinton et al., arXiv 1503.02531; Adam: Kingma and Ba, arXiv 1412.6980.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bitatlas.model.decoder import Decoder
from bitatlas.model.gradients import final_gradient, send_back
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import is_chain, logits_of, record, slice_tokens, token_spans, whole_logits
from bitatlas.model.linear import oriented
from bitatlas.model.streaming import LazyMapping
from bitatlas.quantize.bank import load_checked, save_checked
from bitatlas.quantize.codes import LARGEST_SCALE, SMALLEST_SCALE, Codes

VERSION = 3  # raised whenever the same steps give other codes
STEP_ROWS = 2
MARKS = 4
WARM_UP = 0.05  # of the steps
RATE = 0.01  # how far a step moves the outermost code of a group, in steps of the grid: a wider format's scales change less
MOMENTUM, SQUARES = 0.9, 0.99
MOST_CHANGE = 0.5  # of a scale, relative
TINY = 1e-20
BYTES_A_WEIGHT = 13  # the reference's and the tuned one, and a gradient on its way, float32 each; a code
STATE_BYTES = 2**28  # of what goes into a streamed model's layers in one step that stays in memory; the rest waits in files


@dataclass(frozen=True)
class Tuning:
    """What a run is. rows, select: int64 [rows, tokens]; steps: of `STEP_ROWS` rows each; seed: of their order."""

    rows: Tensor
    select: Tensor
    steps: int
    seed: int = 0

    def batch(self, step: int) -> Tensor:
        """Return the indices of the rows of a step, counted from 0: every row once before any comes again. int64 [STEP_ROWS]"""
        count = min(STEP_ROWS, len(self.rows))
        each = len(self.rows) // count
        epoch, index = divmod(step, each)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return order[index * count : (index + 1) * count]

    def rate(self, step: int) -> float:
        """Return the share of the full rates at a step: up over the first few, then down along a cosine."""
        rise = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def marks(self) -> list[int]:
        """Return the numbers of steps after which the model is measured."""
        return sorted({max(1, round(self.steps * mark / MARKS)) for mark in range(1, MARKS + 1)})


@dataclass
class Tuned:
    """What came out. `select`: damage on the select rows by number of steps, untuned at 0; `steps`: those of the best."""

    codes: Mapping[str, Codes]
    select: dict[int, float]
    steps: int


class TunedWeight:
    """A module's codes while their scales are tuned. `change`: of each scale, relative, float32 [out, groups]."""

    def __init__(self, module: nn.Module, codes: Callable[[], Codes], bits: int):
        """codes: gives those that tuning starts from, whenever they are needed."""
        assert isinstance(module.weight, nn.Parameter)
        self.module, self.parameter, self._codes = module, module.weight, codes
        self.rate = RATE / 2 ** (bits - 1)
        first = codes()
        self.group_size, self.scale = first.group_size, first.scale.to(module.weight.device).float()  # [out, groups]
        self.change, self.momentum, self.squares = (torch.zeros_like(self.scale) for _ in range(3))
        self.calls = 0  # steps in which a gradient came: of an expert that was not chosen there is none

    def scale_now(self) -> Tensor:
        """Return the scales as they are now, float16 [out, groups]."""
        return (self.scale * (1 + self.change)).clamp_(SMALLEST_SCALE, LARGEST_SCALE).half()

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Return the weight as it is now, float32 [out, in]."""
        return replace(self._codes().to(self.scale.device), scale=self.scale_now()).weight()

    @torch.no_grad()
    def write(self) -> None:
        """Write the weight into the parameter, whose data must be a tensor that may be written into."""
        self.parameter.data.copy_(oriented(self.module, self.weight()))

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Turn the gradient of the parameter, while it holds the weight, into the moments of the scales'. `gradient` is written over."""
        products = oriented(self.module, gradient.float().mul_(self.parameter.data))  # [out, in]
        self.calls += 1
        products = nn.functional.pad(products, (0, -products.shape[1] % self.group_size))
        # a weight is in proportion to its scale: their products' sum, less the change, is the gradient of the change
        of_scales = products.unflatten(1, (-1, self.group_size)).sum(-1) / (1 + self.change)  # [out, groups]
        self.momentum.lerp_(of_scales, 1 - MOMENTUM)
        self.squares.lerp_(of_scales.square(), 1 - SQUARES)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the scales."""
        if self.calls:
            first, second = 1 - MOMENTUM**self.calls, 1 - SQUARES**self.calls
            self.change -= self.rate * rate / first * self.momentum / ((self.squares / second).sqrt() + TINY)
            self.change.clamp_(-MOST_CHANGE, MOST_CHANGE)

    def state(self) -> dict[str, Tensor]:
        """Return all that changes, on the CPU."""
        tensors = {"change": self.change, "momentum": self.momentum, "squares": self.squares, "calls": torch.tensor(self.calls)}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.change, self.momentum, self.squares = (
            state[name].to(self.scale.device) for name in ("change", "momentum", "squares")
        )
        self.calls = int(state["calls"])


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, and of a row through the model as it is."""

    step: float
    row: float


class Teacher:
    """The reference's predictions. Where layers follow each other its last hidden states are kept; else its weights are put back for a pass."""

    def __init__(self, decoder: Decoder, reference: Mapping[str, Tensor], head: Mapping[str, Tensor]):
        """reference: weights that are put back where a model is run whole; head: those behind the layers that are put back for logits."""
        self.decoder, self.reference, self.head = decoder, reference, head
        self._final: dict[int, Tensor] = {}  # row's number -> [1, tokens, width]

    @torch.no_grad()
    def see(self, rows: Tensor, numbers: Sequence[int]) -> None:
        """Run the reference over rows [rows, tokens], which get these numbers; call it while the model holds the reference weights."""
        if is_chain(self.decoder):
            batches = [row[None].to(self.decoder.device) for row in rows]
            self._final.update(zip(numbers, record(self.decoder, batches).final, strict=True))

    @torch.no_grad()
    def log_p(self, batch: Tensor, numbers: Sequence[int], span: slice) -> Tensor:
        """Return log-probabilities [rows, tokens of the span, vocabulary] of rows that were seen."""
        if not is_chain(self.decoder):
            with self.decoder.swapped(self.reference):
                return torch.log_softmax(whole_logits(self.decoder, batch)[:, span].float(), -1)
        final = torch.cat([self._final[number] for number in numbers])
        with self.decoder.swapped(self.head):
            logits = logits_of(self.decoder, batch[:, span], slice_tokens(self.decoder, final, span))
        return torch.log_softmax(logits.float(), -1)


@dataclass
class Tuner:
    """Tunes a decoder's modules. `codes`, `bits`: of each; `state_file`: where the state lies between marks.

    beside: weights of an embedding or a head that are in place all the while, and stay.
    """

    decoder: Decoder
    codes: Mapping[str, Codes]
    bits: Mapping[str, int]
    tuning: Tuning
    state_file: Path | None = None
    name: str = "tuning"  # of the state: one run's is not taken for another's
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._streamed = self.decoder.stream is not None  # then the layers follow each other: nothing else can be streamed
        reference = {} if self._streamed else self.decoder.references([*self.codes, *self.beside])
        heads = [name for name in self.beside if self.decoder.stages_of(name)[-1] == self.decoder.behind]
        self.teacher = Teacher(self.decoder, reference, self.decoder.references(heads))

    def run(self, progress: Callable[[int, int], None] | None = None) -> Tuned:
        """Tune, and return the best codes of all marks. The model is as before, to the last bit, whatever happens."""
        tuning = self.tuning
        needed = sorted({int(row) for step in range(tuning.steps) for row in tuning.batch(step)})
        self.teacher.see(tuning.rows[needed], needed)
        self.teacher.see(tuning.select, range(len(tuning.rows), len(tuning.rows) + len(tuning.select)))
        with self._tuned() as weights:
            return self._steps(weights, progress)

    def pace(self, tries: int = 2) -> Pace:
        """Time a step, and a row of the reference's: the quickest of a few, which change nothing."""
        numbers = range(min(STEP_ROWS, len(self.tuning.rows)))
        rows, steps = [], []
        for number in numbers:
            begun = time.perf_counter()
            self.teacher.see(self.tuning.rows[number : number + 1], [number])
            rows.append(time.perf_counter() - begun)
        with self._tuned() as weights:
            for _ in range(tries):
                begun = time.perf_counter()
                self._step(weights, list(numbers), 0.0)
                steps.append(time.perf_counter() - begun)
        return Pace(min(steps), min(rows))

    def seconds(self, steps: int, pace: Pace) -> float:
        """Return what so many steps take, with the rows that the reference reads for them and all marks."""
        read = min(steps * STEP_ROWS, len(self.tuning.rows)) + (MARKS + 2) * len(self.tuning.select)
        return steps * pace.step + read * pace.row

    def steps_within(self, seconds: float, pace: Pace) -> int:
        """Return the most steps that take at most so many seconds; at least one."""
        least, most = 1, max(1, int(seconds / pace.step))
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self.seconds(middle, pace) <= seconds else (least, middle - 1)
        return least

    def _steps(self, weights: dict[str, TunedWeight], progress: Callable[[int, int], None] | None) -> Tuned:
        best = Tuned(self.codes, {}, 0)
        start = self._restore(weights, best)
        if not start:
            best.select[0] = self.damage()
        marks = self.tuning.marks()
        for step in range(start, self.tuning.steps):
            self._step(weights, self.tuning.batch(step).tolist(), self.tuning.rate(step))
            if step + 1 in marks:
                self._mark(weights, best, step + 1)
            if progress:
                progress(step + 1, self.tuning.steps)
        return best

    def _mark(self, weights: dict[str, TunedWeight], tuned: Tuned, step: int) -> None:
        """Measure the model, and keep its codes where they are the best."""
        damage = self.damage()
        if damage < min(tuned.select.values()):
            tuned.codes = self._with_scales({name: weight.scale_now() for name, weight in weights.items()})
            tuned.steps = step
        tuned.select[step] = damage
        self._save(weights, tuned)

    def _with_scales(self, scales: Mapping[str, Tensor]) -> Mapping[str, Codes]:
        """Return the codes with other scales."""
        return LazyMapping(
            self.codes, lambda name: replace(self.codes[name], scale=scales[name].to(self.codes[name].scale.device))
        )

    def _step(self, weights: dict[str, TunedWeight], numbers: Sequence[int], rate: float) -> None:
        batch = self.tuning.rows[list(numbers)].to(self.decoder.device)
        if self._streamed:
            self._layerwise_gradients(weights, batch, numbers)
        else:
            with torch.enable_grad():
                logits = self.decoder.model(input_ids=batch, use_cache=False).logits
            logits.backward(self._score(logits.detach(), batch, numbers, slice(0, batch.shape[1])))
            del logits
        for weight in weights.values():
            weight.step(rate)
            if not self._streamed:
                weight.write()

    def _score(self, logits: Tensor, batch: Tensor, numbers: Sequence[int], span: slice) -> Tensor:
        """Return the gradient of the mean KL a token with respect to the logits of a span: what the model predicts less what the reference predicts."""
        log_p = self.teacher.log_p(batch, numbers, span)
        return torch.softmax(logits.float(), -1).sub_(log_p.exp_()).div_(batch.numel()).to(logits.dtype)

    def _layerwise_gradients(self, weights: dict[str, TunedWeight], batch: Tensor, numbers: Sequence[int]) -> None:
        """Run a batch forwards and backwards with one layer's weights in memory at a time."""
        decoder = self.decoder
        with StateCache(STATE_BYTES) as states:
            recorded = record(decoder, [batch], states)
            gradients = [
                final_gradient(decoder, batch, recorded.final[0], lambda logits, span: self._score(logits, batch, numbers, span))
            ]
            for index in reversed(range(len(recorded.starts[0].calls))):
                of_layer = [weight for name, weight in weights.items() if decoder.layer_of(name) == index]
                parameters = [weight.parameter for weight in of_layer]
                with decoder.held(index):
                    new = send_back(decoder, index, recorded, 0, gradients, parameters)
                    for weight, gradient in zip(of_layer, new, strict=True):
                        if gradient is not None:
                            weight.take(gradient)

    @torch.no_grad()
    def damage(self) -> float:
        """Return the damage of the model as it is now on the select rows, nats/token."""
        decoder, first, total = self.decoder, len(self.tuning.rows), 0.0
        batches = [row[None].to(decoder.device) for row in self.tuning.select]
        # all rows through a layer together; of a model that is run whole, whose "final" is a row's logits, one after the other
        groups = [batches] if is_chain(decoder) else [[batch] for batch in batches]
        finals = (final for group in groups for final in record(decoder, group).final)
        for number, (batch, final) in enumerate(zip(batches, finals, strict=True), start=first):
            for span in token_spans(1, batch.shape[1], decoder.vocabulary):
                log_p = self.teacher.log_p(batch, [number], span)
                logits = logits_of(decoder, batch[:, span], slice_tokens(decoder, final, span))
                q = torch.log_softmax(logits.float(), -1)
                total += float((log_p.exp() * (log_p - q)).sum(dtype=torch.float64))
        return total / self.tuning.select.numel()

    @contextmanager
    def _tuned(self) -> Iterator[dict[str, TunedWeight]]:
        """Put the codes' weights into the model within the block, with gradients."""
        with ExitStack() as stack:
            weights = {
                name: TunedWeight(self.decoder.model.get_submodule(name), partial(self.codes.__getitem__, name), self.bits[name])
                for name in self.codes
            }
            stack.enter_context(self.decoder.swapped(self.beside))
            current = LazyMapping(weights, lambda name: weights[name].weight())
            stack.enter_context(self.decoder.swapped(current))
            for weight in weights.values():
                parameter = weight.parameter
                stack.callback(setattr, parameter, "requires_grad", parameter.requires_grad)
                parameter.requires_grad = True
                if not self._streamed:
                    stack.callback(parameter.register_post_accumulate_grad_hook(partial(_take, weight)).remove)
            yield weights

    # --- state -----------------------------------------------------------------------------------------------------------

    def _save(self, weights: Mapping[str, TunedWeight], tuned: Tuned) -> None:
        if self.state_file is None:
            return
        tensors = {f"{name} {key}": t for name, weight in weights.items() for key, t in weight.state().items()}
        tensors |= {f"{name} best": tuned.codes[name].scale.cpu().contiguous() for name in tuned.codes}
        tensors["select"] = torch.tensor(sorted(tuned.select.items()), dtype=torch.float64)
        tensors["steps"] = torch.tensor(tuned.steps)
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        save_checked(tensors, self.state_file, self.name)

    def _restore(self, weights: Mapping[str, TunedWeight], tuned: Tuned) -> int:
        """Take up the state that lies in the file, and return its number of steps; 0 where there is none of this run."""
        if self.state_file is None or not self.state_file.is_file():
            return 0
        try:
            tensors = load_checked(self.state_file, self.name)
        except (SafetensorError, ValueError, OSError):
            return 0
        for name, weight in weights.items():
            weight.restore({key: tensors[f"{name} {key}"] for key in weight.state()})
            if not self._streamed:
                weight.write()
        tuned.codes = self._with_scales({name: tensors[f"{name} best"] for name in weights})
        tuned.select = {int(step): damage for step, damage in tensors["select"].tolist()}
        tuned.steps = int(tensors["steps"])
        return max(tuned.select)


def _take(weight: TunedWeight, parameter: nn.Parameter) -> None:
    """Take the gradient that has come for the parameter, and drop it."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    weight.take(gradient)
