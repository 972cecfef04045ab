"""Swaps restore, resumed passes equal full ones to the last bit, damage equals an independent computation, the journal remembers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitatlas.data.rows import make_rows
from bitatlas.measure.damage import DamageMeter, StateBudget, Swap, kl_per_token
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.model.hidden_states import StateCache
from bitatlas.model.layerwise import BATCH_ROWS, Job, follow, logits_of, record
from bitatlas.quantize import QUANTIZERS
from bitatlas.quantize.bank import Bank
from bitatlas.records.formats import FORMATS
from bitatlas.records.journal import Journal
from tiny import FAMILIES, TEXT, make_checkpoint

CANDIDATES = {name: FORMATS[name] for name in ("int2_g32", "int4_g32")}


def setup(folder: Path, journal: Journal | None = None) -> tuple[Checkpoint, torch.nn.Module, DamageMeter]:
    checkpoint = open_checkpoint(str(folder), fuse=False)
    decoder = checkpoint.load_model()
    bank = Bank(decoder, [m.name for m in checkpoint.modules], "rtn")
    return checkpoint, decoder, DamageMeter(decoder, bank, checkpoint.info.weights_sha256, "rtn", journal or Journal(None))


def rows_for(checkpoint: Checkpoint) -> torch.Tensor:
    return make_rows([TEXT], checkpoint.load_tokenizer(), "text", (20, 2, 2), 16, 128, 0).fit


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_passes_in_pieces_equal_full_passes_to_the_last_bit(family: str, tmp_path: Path):
    checkpoint, decoder, meter = setup(make_checkpoint(tmp_path / family, family))
    ids = rows_for(checkpoint)[:6]
    batches = [ids[:4], ids[4:]]
    before = {name: p.clone() for name, p in decoder.model.named_parameters()}
    whole = [decoder.model(part).logits for part in batches]
    with StateCache(2**12) as shelf:  # so little that most states go through files
        recorded = record(decoder, batches, shelf)
        assert shelf.spilled
        assert all(
            torch.equal(logits_of(decoder, *pair), logits) for *pair, logits in zip(batches, recorded.final, whole, strict=True)
        )
        weights = [meter.bank.weights({m.name: "int2_g32" for m in checkpoint.modules if m.layer == layer}) for layer in range(3)]
        jobs = [
            Job(layer, lambda at, own=own, layer=layer: decoder.swapped(own if at == layer else {}))
            for layer, own in enumerate(weights)
        ]
        endings = follow(decoder, recorded, jobs)
    for own, ending in zip(weights, endings, strict=True):
        with decoder.swapped(own):
            assert all(
                torch.equal(logits_of(decoder, part, state), decoder.model(part).logits)
                for part, state in zip(batches, ending.final, strict=True)
            )
            assert not torch.equal(decoder.model(batches[0]).logits, whole[0])
    assert all(torch.equal(before[name], p) for name, p in decoder.model.named_parameters())
    assert torch.equal(decoder.model(batches[0]).logits, whole[0])


def test_a_swap_restores_after_an_error_and_refuses_a_wrong_shape(tiny_llama: Path):
    _, decoder, _ = setup(tiny_llama)
    name = "model.layers.1.mlp.up_proj"
    before = decoder.weight(name).clone()
    with pytest.raises(KeyboardInterrupt), decoder.swapped({name: torch.zeros_like(before)}):
        assert not decoder.weight(name).any()
        raise KeyboardInterrupt
    assert torch.equal(decoder.weight(name), before)
    with pytest.raises(ValueError, match="does not fit"), decoder.swapped({name: torch.zeros(3, 3)}):
        pass


def test_damage_equals_a_float64_computation(tiny_llama: Path):
    checkpoint, decoder, meter = setup(tiny_llama)
    rows = rows_for(checkpoint)
    plan = {m.name: "int2_g32" if m.layer == 1 else "int4_g32" for m in checkpoint.modules}
    measured = meter.plans({"plan": plan}, rows)["plan"]
    decoder.model.double()
    reference = torch.log_softmax(decoder.model(rows).logits, -1)
    with decoder.swapped({name: w.double() for name, w in meter.bank.weights(plan).items()}):
        changed = torch.log_softmax(decoder.model(rows).logits, -1)
    exact = torch.nn.functional.kl_div(changed, reference, reduction="none", log_target=True).sum(-1).mean(1)
    assert torch.allclose(torch.from_numpy(measured), exact, rtol=2e-4, atol=1e-6)  # float32 logits against float64


def test_swaps_equal_whole_plans(tiny_llama: Path):
    checkpoint, _, meter = setup(tiny_llama)
    rows = rows_for(checkpoint)
    base = {m.name: "int4_g32" for m in checkpoint.modules}
    swaps = {m.name: Swap(m.layer, {m.name: "int2_g32"}) for m in checkpoint.modules}
    alone = meter.swaps(base, swaps, rows)
    meter.journal = Journal(None)
    whole = meter.plans({name: {**base, name: "int2_g32"} for name in swaps}, rows)
    assert all((alone[name] == whole[name]).all() for name in swaps)


def test_batches_share_what_is_made_of_codes_and_are_measured_as_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bitatlas.model.layerwise.batch_rows", lambda *_: 4)
    checkpoint, decoder, together = setup(tiny_llama)
    alone = DamageMeter(decoder, together.bank, "", "rtn", Journal(None), StateBudget(state_bytes=1))
    rows = rows_for(checkpoint)
    assert len(alone.chunks(rows)) == 5 and len(together.chunks(rows)) == 1
    base = {m.name: "int4_g32" for m in checkpoint.modules}
    swaps = {m.name: Swap(m.layer, {m.name: "int2_g32"}) for m in checkpoint.modules}
    made: list[str] = []
    of_bank = Bank._weight
    monkeypatch.setattr(Bank, "_weight", lambda self, module, name: made.append(name) or of_bank(self, module, name))
    found, counts = [], []
    for meter in (together, alone):
        found.append(list(meter.swaps(base, swaps, rows).values()))
        counts.append(len(made) - sum(counts))
    assert all((mine == theirs).all() for mine, theirs in zip(*found, strict=True))
    assert counts[1] == 5 * counts[0]


def test_nothing_is_measured_twice(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "run.sqlite")
    checkpoint, _, meter = setup(tiny_llama, journal)
    rows = rows_for(checkpoint)
    plans = {name: dict.fromkeys([m.name for m in checkpoint.modules], name) for name in CANDIDATES}
    first = meter.plans({"int2_g32": plans["int2_g32"]}, rows)
    journal.close()
    _, _, meter = setup(tiny_llama, Journal(tmp_path / "run.sqlite"))
    passes: list[int] = []

    def counted(decoder, batches, inputs=None):
        passes.append(sum(map(len, batches)))
        return record(decoder, batches, inputs)

    def counted_jobs(decoder, recorded, jobs):
        passes.append(len(jobs) * sum(map(len, recorded.ids)))
        return follow(decoder, recorded, jobs)

    monkeypatch.setattr("bitatlas.measure.damage.record", counted)
    monkeypatch.setattr("bitatlas.measure.damage.follow", counted_jobs)
    second = meter.plans(plans, rows)
    assert sum(passes) == 2 * len(rows)  # the reference and the one plan that was missing
    assert (second["int2_g32"] == first["int2_g32"]).all()
    meter.plans(plans, rows)
    assert sum(passes) == 2 * len(rows)


def test_codes_that_are_missing_are_made_in_one_go(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """A fit passes through the whole model: once for a plan, not once for each of its modules."""
    checkpoint, decoder, _ = setup(tiny_llama)
    rows, names = rows_for(checkpoint), [module.name for module in checkpoint.modules]
    real, asked = QUANTIZERS["gptq"], []

    def counted(decoder, formats, rows):
        asked.append(len(formats))
        return real.quantize(decoder, formats, rows)

    monkeypatch.setitem(QUANTIZERS, "gptq", replace(real, quantize=counted))
    bank = Bank(decoder, names, "gptq", rows=rows)
    DamageMeter(decoder, bank, "", "gptq", Journal(None)).plans({"plan": dict.fromkeys(names, "int4_g32")}, rows)
    assert asked == [len(names)]


def test_zero_damage_of_the_reference(tiny_llama: Path):
    checkpoint, _, meter = setup(tiny_llama)
    assert meter.plans({"reference": {}}, rows_for(checkpoint))["reference"].max() < 1e-6


@pytest.mark.parametrize(("size", "moved"), [(3.0, 0.014), (3.0, 1e-3), (3.0, 5.0), (80.0, 60.0)])
def test_small_and_enormous_damages_keep_their_digits(size: float, moved: float):
    """Against float64 on the same float32 logits, 16 MiB of them. Float32 sums of 50,000 terms near 1 leave about 1e-7 nats a token, which
    over 80 tokens is 1e-8: a thousandth of 1e-5. A change of all logits by 20 changes no distribution."""
    generator = torch.Generator().manual_seed(0)
    logits = size * torch.randn(2, 40, 50_000, generator=generator)
    changed = logits + moved * torch.randn(logits.shape, generator=generator)
    log_p = torch.log_softmax(logits.double(), -1)
    for shift in (0.0, 20.0):
        shifted = torch.log_softmax((changed + shift).double(), -1)
        exact = (log_p.exp() * (log_p - shifted)).sum(-1).mean()
        found = kl_per_token(log_p.float(), log_p.float().exp(), changed + shift).mean()
        assert float(found) == pytest.approx(float(exact), rel=1e-3, abs=1e-8)


def test_a_large_vocabulary_goes_through_layers_in_whole_batches(tmp_path: Path):
    checkpoint, decoder, meter = setup(make_checkpoint(tmp_path / "wide", vocab_size=150_000))
    rows = rows_for(checkpoint)
    assert len(meter.chunks(rows)[0][0]) == BATCH_ROWS
    assert len(meter.spans(rows[:BATCH_ROWS])) > 1
    plans = {name: dict.fromkeys([m.name for m in checkpoint.modules], name) for name in CANDIDATES}
    in_pieces = meter.plans(plans, rows)
    at_once = DamageMeter(decoder, meter.bank, "", "rtn", Journal(None), StateBudget(logit_bytes=2**30)).plans(plans, rows)
    for name, damage in in_pieces.items():
        assert damage == pytest.approx(at_once[name], rel=1e-4)
