"""GGUF through llama.cpp itself: its blocks, files that it runs, their damage against the plan's promise, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bitatlas.data as demo
from bitatlas.cli.main import main
from bitatlas.errors import UserError
from bitatlas.export.gguf.write import COMMANDS, TYPES
from bitatlas.export.targets import export_plan
from bitatlas.measure.damage import DamageMeter
from bitatlas.model.checkpoint import Checkpoint, open_checkpoint
from bitatlas.quantize import ggml
from bitatlas.quantize.bank import Bank
from bitatlas.records import Plan, PlanDamage
from bitatlas.records.files import read_record, to_json
from bitatlas.records.formats import FORMATS, LLAMA_CPP, LLAMA_CPP_BLOCKS
from bitatlas.records.journal import Journal
from bitatlas.stats.bootstrap import measured
from gguf_plans import QUIET, make_plan
from tiny import SHARED, make_checkpoint

gguf = pytest.importorskip("gguf")
from bitatlas.export.gguf.names import TEXTS, vocabulary_of  # noqa: E402
from bitatlas.export.gguf.recipes import BASES, NEED_IMATRIX, ModelFacts, types_of  # noqa: E402
from bitatlas.export.gguf.run import find_library, open_gguf  # noqa: E402
from bitatlas.export.gguf.write import blueprint_of, write_gguf  # noqa: E402
from bitatlas.run.options import VerifyOptions  # noqa: E402
from bitatlas.run.verify import damage_in_llama_cpp, verify_gguf  # noqa: E402
from llama_quantize import llama_quantize  # noqa: E402

if find_library() is None:
    pytest.skip("no llama.cpp at hand: `make test` fetches one, and BITATLAS_LLAMA_CPP names one", allow_module_level=True)

MIXED = ["q4_0", "q8_0", "q5_1", "iq4_nl", "q5_0", "q4_1"]  # blocks of 32
K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq3_s", "mxfp4"]
# What llama.cpp adds to our reconstruction: inputs rounded to 8 bits, a float16 cache. Seen on the tiny models: 1e-4 to 3.3e-4.
RUNTIME_NATS = 1e-3


def exported(model: Path, plan: Plan, place: Path, with_model: bool = True) -> Path:
    """The folder that `bitatlas export` wrote."""
    place.mkdir(exist_ok=True)
    (place / "plan.json").write_text(to_json(plan), encoding="utf-8")
    export_plan(place / "plan.json", LLAMA_CPP, place / "out", str(model) if with_model else None, QUIET)
    return place / "out"


def tensors_of(file: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_gguf_runs_as_it_was_measured(family: str, tmp_path: Path):
    """Types per tensor as planned, bytes as promised, and llama.cpp's logits those of our reconstruction but for its own rounding."""
    model = make_checkpoint(tmp_path / "model", family)
    plan = make_plan(model, MIXED)
    (file,) = exported(model, plan, tmp_path).glob("*.gguf")
    checkpoint = open_checkpoint(str(model), None, False)
    kinds = {name: tensor for name, tensor in tensors_of(file).items() if tensor.tensor_type.name.lower() in LLAMA_CPP_BLOCKS}
    assert len(kinds) == len(plan.modules)
    assert sum(tensor.n_bytes for tensor in kinds.values()) == plan.size.quantized_bytes
    assert kinds["blk.0.attn_k.weight"].tensor_type.name.lower() == plan.modules["model.layers.0.self_attn.k_proj"]
    whole, rest = whole_and_rest(checkpoint, plan, file, 16)  # mistral's window is 16 tokens
    assert rest.max() < RUNTIME_NATS < whole.min()  # the second says that the first could fail


def whole_and_rest(checkpoint: Checkpoint, plan: Plan, file: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What llama.cpp's logits of the file differ by from the reference's, and from our reconstruction's, nats/token."""
    reference = checkpoint.load_model()
    bank = Bank(reference, list(plan.modules), LLAMA_CPP, plan.formats)
    rows = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(0))
    with open_gguf(file, length) as session:
        whole = damage_in_llama_cpp(reference, session, rows, lambda done, total: None)
        with reference.swapped(bank.weights(plan.modules)):
            return whole, damage_in_llama_cpp(reference, session, rows, lambda done, total: None)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_embeddings(kind: str, tmp_path: Path):
    """Unquantized, so that only the float16 cache is left: 1e-7 nats/token were seen, a wrong scale gives 0.01 and more."""
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32} if kind == "llama3" else {}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **more}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "model", rope_parameters=rope)), None, False)
    write_gguf(tmp_path / "f32.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f32"), lambda done, total: None)
    rows = torch.randint(300, (1, 90), generator=torch.Generator().manual_seed(0))
    with open_gguf(tmp_path / "f32.gguf", 90) as session:
        assert damage_in_llama_cpp(checkpoint.load_model(), session, rows, lambda done, total: None).max() < 1e-5


def test_llama_quantize_makes_the_same_file_of_the_list(tmp_path: Path):
    """`llama_model_quantize`, which llama-quantize calls, given our float32 GGUF and tensor-types.txt: every tensor's bytes are equal."""
    model = make_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=2, scale=0.25)
    plan = make_plan(model, K_QUANTS)
    out = exported(model, plan, tmp_path)
    checkpoint = open_checkpoint(str(model), None, False)
    write_gguf(tmp_path / "f32.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f32"), lambda done, total: None)
    lines = [line.rpartition("=") for line in (out / TYPES).read_text().split()]
    types = {pattern: kind for pattern, _, kind in lines}
    theirs = llama_quantize(tmp_path / "f32.gguf", tmp_path / "made.gguf", "Q8_0", types=types, outside="f32")
    (file,) = out.glob("*.gguf")
    ours = tensors_of(file)
    assert set(ours) == set(theirs) and {t.tensor_type.name.lower() for t in ours.values()} == {*K_QUANTS, "f32"}
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type and np.array_equal(tensor.data, theirs[name].data), name
    whole, rest = whole_and_rest(checkpoint, plan, file, 32)
    assert rest.max() < RUNTIME_NATS < whole.min()


@pytest.mark.parametrize("with_importance", [True, False])
def test_every_types_blocks_are_llama_cpps(with_importance: bool, tmp_path: Path):
    """Byte for byte, with an importance matrix and without one."""
    needs = [name for name in LLAMA_CPP_BLOCKS if name.startswith(("iq1", "iq2")) or name == "iq3_xxs"]
    kinds = [name for name in LLAMA_CPP_BLOCKS if with_importance or name not in needs]
    model = make_checkpoint(
        tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_key_value_heads=4
    )
    checkpoint = open_checkpoint(str(model), None, False)
    write_gguf(tmp_path / "f32.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f32"), lambda done, total: None)
    source = {
        name: tensor
        for name, tensor in tensors_of(tmp_path / "f32.gguf").items()
        if name.startswith("blk") and len(tensor.shape) > 1
    }
    types = {f"^{re.escape(name)}$": kinds[index % len(kinds)] for index, name in enumerate(source)}
    generator = np.random.default_rng(0)
    importance = {name: generator.gamma(0.5, size=int(tensor.shape[0])).astype(np.float32) for name, tensor in source.items()}
    theirs = llama_quantize(
        tmp_path / "f32.gguf", tmp_path / "made.gguf", "Q8_0", importance if with_importance else None, types, outside="f32"
    )
    assert {theirs[name].tensor_type.name.lower() for name in source} == set(kinds)
    for name, tensor in source.items():
        kind = theirs[name].tensor_type.name.lower()
        given = torch.from_numpy(importance[name]) if with_importance else None
        blocks = ggml.quantize(torch.from_numpy(np.array(tensor.data)), FORMATS[kind], given).blocks.numpy()
        assert np.array_equal(blocks, theirs[name].data), (kind, (blocks != theirs[name].data).any(1).mean())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 17}),
        ("qwen2", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 9}),  # rows that blocks of 256 do not divide
        ("llama", {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 8, "tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_recipes_are_llama_cpps(family: str, changes: dict, tmp_path: Path):
    """The types that llama_model_quantize gives to every tensor, under every name, with an importance matrix and where it needs none without."""
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "model", family, **changes)), None, False)
    write_gguf(tmp_path / "f32.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f32"), lambda done, total: None)
    widths = {name: int(tensor.shape[0]) for name, tensor in tensors_of(tmp_path / "f32.gguf").items() if len(tensor.shape) > 1}
    importance = {name: np.ones(width, np.float32) for name, width in widths.items()}
    config = checkpoint.config
    facts = ModelFacts(family, config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads)
    for recipe in BASES:
        for given in (importance, None):
            if given is None and recipe in NEED_IMATRIX:
                continue
            theirs = llama_quantize(tmp_path / "f32.gguf", tmp_path / "made.gguf", recipe, given)
            expected = {name: theirs[name].tensor_type.name.lower() for name in widths}
            assert types_of(recipe, widths, facts, given is not None) == expected, recipe


def test_llama_cpp_gives_the_tokenizers_tokens(tmp_path: Path, tiny_llama: Path):
    tokenizer = open_checkpoint(str(tiny_llama), None, False).load_tokenizer()
    found, note = vocabulary_of(tokenizer, 300)
    assert (found.model, note) == ("gpt2", "")  # every text of TEXTS was compared
    assert len(TEXTS) == 16


@pytest.mark.parametrize(("name", "note"), [("babyllama-105", "no bytes"), ("stories260K", "")])
def test_vocabularies_like_sentencepieces(name: str, note: str):
    if not (SHARED / "models" / name).is_dir():
        pytest.skip("the trained checkpoints are not at hand")
    checkpoint = open_checkpoint(str(SHARED / "models" / name), None, False)
    found, told = vocabulary_of(checkpoint.load_tokenizer(), checkpoint.vocabulary)
    assert found.model == "llama" and found.space_prefix and found.add_bos
    assert note in told and "none of its ways" not in told


# --- the plan's promise ------------------------------------------------------------------------------------------------


def promised(model: Path, plan: Plan, rows: torch.Tensor) -> Plan:
    """The plan with its damage as the survey measures it, by reconstruction."""
    checkpoint = open_checkpoint(str(model), None, False)
    reference = checkpoint.load_model()
    bank = Bank(reference, list(plan.modules), LLAMA_CPP, plan.formats)
    meter = DamageMeter(reference, bank, checkpoint.info.weights_sha256, bank.identity, Journal(None))
    nats = meter.plans({"plan": plan.modules}, rows)["plan"]
    return dataclasses.replace(
        plan, damage=PlanDamage(None, measured(nats, "nats/token", "plan", "test", 0)), codes=bank.identity
    )


@pytest.mark.slow
def test_the_demo_in_llama_cpp_keeps_its_promise(tmp_path: Path, monkeypatch, capsys):
    """The bar: the GGUF loads with mixed types, and llama.cpp's damage, on rows of its own, has the promise within its interval."""
    from bitatlas.data.rows import make_rows
    from bitatlas.data.texts import read_documents

    plan = make_plan(demo.MODEL_DIR, ["q4_0", "q5_1", "q8_0", "iq4_nl"])
    checkpoint = open_checkpoint(str(demo.MODEL_DIR), None, False)
    text = str(demo.TEXT_FILE)
    documents, tokenizer = read_documents(text), checkpoint.load_tokenizer()
    test = make_rows(documents, tokenizer, text, (2, 2, 24), 64, 512, 0, vocabulary=checkpoint.vocabulary).test
    plan = promised(demo.MODEL_DIR, plan, test)
    (file,) = exported(demo.MODEL_DIR, plan, tmp_path).glob("*.gguf")
    rows = ["--tokens", text, "--rows", "2,2,24", "--row-length", "64"]
    found = verify_gguf(VerifyOptions(demo.MODEL_DIR, file, tokens=text, rows=(2, 2, 24), row_length=64, quiet=True))
    low, high = found.damage.ci95
    assert found.kept and low <= plan.damage.measured.mean <= high
    better = dataclasses.replace(plan, damage=PlanDamage(low / 2, None))  # a promise that it does not keep
    (file,) = exported(demo.MODEL_DIR, better, tmp_path / "better").glob("*.gguf")
    assert run(monkeypatch, "verify", demo.MODEL_DIR, file, *rows, "-q") == 1
    assert "NOT KEPT" in capsys.readouterr().out


@pytest.mark.slow
def test_from_survey_to_gguf(tiny_llama: Path, tmp_path: Path, monkeypatch, capsys):
    """The commands of docs/gguf.md: a plan of llama.cpp's formats, its file, and that file on the survey's own test rows."""
    (tmp_path / "text.txt").write_text(" ".join(f"The red fox runs {n} miles." for n in range(2000)))
    out, file = tmp_path / "atlas", tmp_path / "atlas" / "gguf" / "tiny-llama.gguf"
    words = [
        "--formats",
        "q4_0,q5_1,q8_0",
        "--stored-bits",
        "6",
        "--rows",
        "4,4,8",
        "--row-length",
        "32",
    ]
    rest = ["--tasks", "none", "--no-refine", "--no-fuse", "-q"]
    assert run(monkeypatch, "survey", tiny_llama, "--out", out, "--tokens", tmp_path / "text.txt", *words, *rest) == 0
    assert (
        run(monkeypatch, "export", out / "plan.json", "--to", "llama.cpp", "--model", tiny_llama, "--out", file.parent, "-q") == 0
    )
    plan = read_record(out / "plan.json", Plan)
    assert f"{plan.size.quantized_bytes:,} bytes, promised {plan.size.quantized_bytes:,}" in capsys.readouterr().out
    assert run(monkeypatch, "verify", tiny_llama, file, "-q") == 0
    found = verify_gguf(VerifyOptions(tiny_llama, file, rows=(2, 2, 2), row_length=16, quiet=True))
    assert found.damage.n == 8 and found.promised == plan.damage.measured.mean
    assert run(monkeypatch, "verify", tiny_llama, file, "--tokens", tmp_path / "text.txt", "--row-length", "200", "-q") == 2
    assert "--row-length 200: the model's context is 128 tokens" in capsys.readouterr().err


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_gguf_of_other_types_does_not_keep_the_plan(tiny_llama: Path, tmp_path: Path):
    """A plan beside a file that holds something else, as llama-quantize's own choices would be."""
    out = exported(tiny_llama, make_plan(tiny_llama, ["q4_0"]), tmp_path)
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    write_gguf(out / "f16.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f16"), lambda done, total: None)
    (tmp_path / "text.txt").write_text(" ".join(f"The red fox runs {n} miles." for n in range(400)))
    found = verify_gguf(
        VerifyOptions(tiny_llama, out / "f16.gguf", tokens=tmp_path / "text.txt", rows=(2, 2, 4), row_length=16, quiet=True)
    )
    assert not found.size_kept and found.disk == (found.plan.size.quantized_bytes, 0)


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_what_verify_refuses(tiny_llama: Path, tmp_path: Path, monkeypatch, capsys):
    out = exported(tiny_llama, make_plan(tiny_llama, ["q4_0"]), tmp_path)
    (file,) = out.glob("*.gguf")
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert run(monkeypatch, "verify", other, file) == 2
    assert "not the weights that the plan was made for" in capsys.readouterr().err
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[:5000])
    assert run(monkeypatch, "verify", tiny_llama, half) == 2
    assert "not a whole GGUF" in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    checkpoint = open_checkpoint(str(tiny_llama), None, False)
    write_gguf(alone / "f16.gguf", checkpoint, None, None, blueprint_of(checkpoint, None, "f16"), lambda done, total: None)
    assert run(monkeypatch, "verify", tiny_llama, alone / "f16.gguf") == 2
    assert "holds no plan" in capsys.readouterr().err
    assert run(monkeypatch, "verify", tiny_llama, tmp_path / "none.gguf") == 2
    assert "no such file" in capsys.readouterr().err
    windowed = make_checkpoint(tmp_path / "mistral", "mistral")  # of 16 tokens
    (file,) = exported(windowed, make_plan(windowed, ["q4_0"]), tmp_path / "windowed").glob("*.gguf")
    (tmp_path / "text.txt").write_text(" ".join(f"The red fox runs {n} miles." for n in range(400)))
    words = ["--tokens", tmp_path / "text.txt", "--rows", "2,2,2", "--row-length", "17"]
    assert run(monkeypatch, "verify", windowed, file, *words) == 2
    assert "--row-length 17: the GGUF's context is 16 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"half.gguf: llama.cpp cannot load it"), open_gguf(half, 16):
        pass


def test_rows_that_blocks_do_not_divide_are_refused_at_the_start(tmp_path: Path, monkeypatch, capsys):
    model = SHARED / "models" / "stories260K"  # rows of 172
    if not model.is_dir():
        model = make_checkpoint(tmp_path / "model", intermediate_size=172)
    (tmp_path / "text.txt").write_text("Once upon a time there was a fox. " * 2000)
    words = ["--formats", "q4_0,q8_0", "--quantizer", "llama.cpp", "--tokens", tmp_path / "text.txt", "--tasks", "none"]
    assert run(monkeypatch, "survey", model, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert "down_proj has rows of 172, which q4_0 cannot take (whole blocks of 32); no format of llama.cpp takes them" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_export_refuses_integer_formats_and_writes_what_it_can(tmp_path: Path, tiny_llama: Path):
    plan = make_plan(tiny_llama, ["q4_0"])
    ours = dataclasses.replace(
        plan, quantizer="rtn", formats={"int4_g32": FORMATS["int4_g32"]}, modules=dict.fromkeys(plan.modules, "int4_g32")
    )
    (tmp_path / "plan.json").write_text(to_json(ours))
    with pytest.raises(UserError, match=r"--to llama.cpp: .*q_proj has the format int4_g32, .* the nearest that it can is q\d_"):
        export_plan(tmp_path / "plan.json", LLAMA_CPP, tmp_path / "ours", str(tiny_llama), QUIET)
    assert not (tmp_path / "ours").exists()
    out = exported(tiny_llama, plan, tmp_path / "list", with_model=False)
    assert {file.name for file in out.iterdir()} == {TYPES, COMMANDS, "README.md", "plan.json"}
    assert (out / TYPES).read_text().splitlines()[0] == r"^blk\.0\.attn_q\.weight$=q4_0"
    neox = make_checkpoint(tmp_path / "neox", "gpt_neox")
    out = exported(neox, make_plan(neox, ["q8_0"]), tmp_path / "foreign")
    assert not list(out.glob("*.gguf")) and r"^blk\.2\.attn_qkv\.weight$=q8_0" in (out / TYPES).read_text()


def test_a_file_that_is_no_gguf():
    with pytest.raises(UserError, match=r"llama\.cpp cannot load it"), open_gguf(Path(__file__), 8):
        pass
