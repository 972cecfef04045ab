"""Comparing files of a model: figures agree with an independent computation, equal ones tie, and what cannot be compared is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitatlas
import tiny
from bitatlas.cli.main import main
from bitatlas.data.domains import domain_rows
from bitatlas.errors import UserError
from bitatlas.measure.stream import CONTINUED, PROMPT, read_stream
from bitatlas.model.checkpoint import open_checkpoint
from bitatlas.progress import Reporter
from bitatlas.quantize.bank import Bank
from bitatlas.records import Budget, Plan, PlanDamage, PlanModel
from bitatlas.records.comparison import NOISE, TOLD_APART, UNTOLD, Comparison, Deviation
from bitatlas.records.files import to_json
from bitatlas.records.formats import FORMATS
from bitatlas.records.sizes import size_of
from bitatlas.run.compare import compare_models
from bitatlas.run.options import CompareOptions
from tiny import SHARED, make_checkpoint

ROWS, LENGTH = 8, 48


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def compared(out: Path, reference: Path, files: Sequence[Path], *texts: Path | str, **options: object) -> Comparison:
    words = {"rows": ROWS, "quiet": True, **({"tokens": [*map(str, texts)], "row_length": LENGTH} if texts else {}), **options}
    return compare_models(CompareOptions(reference, files, out=out, **words))  # type: ignore[arg-type]


def deviation(result: Comparison, index: int = 0) -> Deviation:
    seen = result.candidates[index].deviation
    assert seen is not None
    return seen


def rounded(source: Path, folder: Path, steps: int) -> Path:
    """A copy whose matrices have so many steps a row."""
    other = Path(shutil.copytree(source, folder))
    tensors = load_file(other / "model.safetensors")
    for name, weight in tensors.items():
        if weight.dim() == 2:
            scale = weight.abs().amax(-1, keepdim=True) / steps
            tensors[name] = (weight / scale).round() * scale
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


# --- figures -----------------------------------------------------------------------------------------------------------


def test_figures_agree_with_transformers_alone(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    """Everything again in float64, by loops."""
    from transformers import AutoModelForCausalLM

    other = rounded(tiny_llama, tmp_path / "rounded", 7)
    result = compared(out, tiny_llama, [other], text)
    seen = deviation(result)
    rows = domain_rows("text", str(text), tiny.tokenizer(), ROWS, LENGTH, 0, 300)
    first, second = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (tiny_llama, other))
    kl, same, shared, losses, tops = [], [], [], [], []
    with torch.no_grad():
        for row in rows.tokens:
            logs = [torch.log_softmax(model(row[None]).logits[0, :-1], -1) for model in (first, second)]
            for p, q, token in zip(*logs, row[1:], strict=True):
                kl.append(float((p.exp() * (p - q)).sum()))
                best = [v.argsort(descending=True)[:5].tolist() for v in (p, q)]
                same.append(best[0][0] == best[1][0])
                shared.append(len({*best[0]} & {*best[1]}) / 5)
                losses.append((float(-p[token]), float(-q[token])))
                tops.append(float(p.exp().max()))
    assert seen.damage.mean == pytest.approx(np.mean(kl), rel=1e-4)
    assert seen.same_top.mean == pytest.approx(np.mean(same))
    assert seen.top5.mean == pytest.approx(np.mean(shared))
    reference, files = np.mean(losses, axis=0)
    assert result.reference_loss is not None
    assert result.reference_loss.mean == pytest.approx(reference, rel=1e-5)
    assert seen.loss.mean == pytest.approx(files, rel=1e-5)
    assert seen.loss_difference.mean == pytest.approx(files - reference, abs=1e-5)
    for percent, value in seen.quantiles.items():
        assert value.mean == pytest.approx(np.percentile(kl, float(percent)), rel=1e-3)
    for bucket in seen.buckets:
        inside = [k for k, top in zip(kl, tops, strict=True) if bucket.low <= top and (top < bucket.high or bucket.high == 1)]
        assert bucket.share == pytest.approx(len(inside) / len(kl))
        assert (bucket.damage is None) == (not inside)
        if bucket.damage:
            assert bucket.damage.mean == pytest.approx(np.mean(inside), rel=1e-3)
    assert seen.estimate_error == 0  # a small vocabulary is kept whole
    assert result.domains[0].tokens == len(kl) == ROWS * (LENGTH - 1)


def test_continuations_agree_until_they_differ(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    """Against greedy writing of both models, token by token."""
    from transformers import AutoModelForCausalLM

    other = rounded(tiny_llama, tmp_path / "rounded", 7)
    seen = deviation(compared(out, tiny_llama, [other], text))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, other)]
    agreed = []
    for row in domain_rows("text", str(text), tiny.tokenizer(), ROWS, LENGTH, 0, 300).tokens:
        written = [row[:PROMPT].tolist() for _ in models]
        count = 0
        with torch.no_grad():
            while count < CONTINUED and written[0] == written[1]:
                for model, tokens in zip(models, written, strict=True):
                    tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
                count += written[0] == written[1]
        agreed.append(count)
    assert seen.agreement is not None
    assert seen.agreement.mean == pytest.approx(np.mean(agreed))
    assert seen.never_differ == pytest.approx(np.mean([count == CONTINUED for count in agreed]))


def test_equal_files_share_a_rank_and_the_better_leads(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    same = Path(shutil.copytree(tiny_llama, tmp_path / "same"))
    fine, twin = rounded(tiny_llama, tmp_path / "fine", 60), rounded(tiny_llama, tmp_path / "twin", 60)
    coarse = rounded(tiny_llama, tmp_path / "coarse", 3)
    result = compared(out, tiny_llama, [coarse, fine, twin, same], text, rows=12)
    ranks = {c.file.name: c.rank for c in result.candidates}
    assert ranks["same"] == 1
    assert ranks["fine"] == ranks["twin"] < ranks["coarse"] == 4
    assert [c.file.name for c in result.candidates][-1] == "coarse"
    by_name = {c.file.name: c for c in result.candidates}
    assert by_name["same"].within_noise
    assert by_name["same"].on_front
    assert not by_name["coarse"].on_front  # no smaller, and told to be worse
    assert not by_name["coarse"].within_noise
    verdicts = {frozenset((p.first, p.second)): p for p in result.pairs}
    assert len(verdicts) == 6
    assert verdicts[frozenset(("fine", "twin"))].verdict == UNTOLD
    assert verdicts[frozenset(("fine", "twin"))].tokens_needed is None  # nothing is seen
    assert verdicts[frozenset(("coarse", "fine"))].verdict == TOLD_APART
    assert abs(verdicts[frozenset(("coarse", "fine"))].difference.mean) == pytest.approx(
        abs(deviation(result, -1).damage.mean - next(c.deviation.damage.mean for c in result.candidates if c.file.name == "fine")), rel=1e-6
    )  # fmt: skip


def test_a_difference_below_the_noise_is_not_called_one(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    same, near = Path(shutil.copytree(tiny_llama, tmp_path / "same")), rounded(tiny_llama, tmp_path / "near", 20_000)
    result = compared(out, tiny_llama, [same, near], text, rows=12)
    (pair,) = result.pairs
    assert pair.holm_p < 0.05  # it is told,
    assert pair.verdict == NOISE  # but rounding does more
    assert {c.rank for c in result.candidates} == {1}
    assert all(c.within_noise for c in result.candidates)


def test_domains_and_chat(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    talk = [
        [{"role": "user", "content": f"The red fox {n}?"}, {"role": "assistant", "content": f"The old oak {n} stands."}]
        for n in range(6)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in talk), encoding="utf-8")
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    other = rounded(model, tmp_path / "rounded", 7)
    sources = [f"chat={tmp_path / 'talk.jsonl'}", f"prose={text}"]
    result = compared(out, model, [other, rounded(model, tmp_path / "more", 4)], *sources, score="assistant")
    chat, prose = result.domains
    assert (chat.name, chat.chat, chat.scored, chat.rows) == ("chat", True, "assistant", 4)
    assert (prose.name, prose.chat, prose.scored, prose.rows) == ("prose", False, "all", 4)
    assert chat.tokens < prose.tokens
    seen = deviation(result)
    weighed = sum(seen.domains[d.name].mean * d.tokens for d in result.domains) / (chat.tokens + prose.tokens)
    assert seen.damage.mean == pytest.approx(weighed)
    assert set(result.pairs[0].domains) == {"chat", "prose"}
    with pytest.raises(UserError, match="--score assistant: no text holds conversations"):
        compared(tmp_path / "b", model, [other], text, score="assistant")


# --- streams -----------------------------------------------------------------------------------------------------------


def test_later_and_without_the_reference(
    tiny_llama: Path, text: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder alone is enough; what was measured is not measured again, and figures are the same."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    first, second = rounded(model, tmp_path / "first", 7), rounded(model, tmp_path / "second", 4)
    together = compared(tmp_path / "both", model, [first, second], text)
    compared(out, model, [first], text)
    moved = Path(shutil.copytree(out, tmp_path / "elsewhere"))
    shutil.rmtree(model)
    from bitatlas.measure import stream

    ran: list[str] = []
    original = stream.Stream.deviations
    monkeypatch.setattr(
        stream.Stream,
        "deviations",
        lambda self, logits, folder, progress: (ran.append(folder.name), original(self, logits, folder, progress)),
    )
    later = compared(moved, moved, [first, second])
    assert len(ran) == 1  # of the first nothing
    assert [c.deviation for c in later.candidates] == [c.deviation for c in together.candidates]
    assert later.pairs == together.pairs
    assert later.noise == together.noise
    assert later.settings["tokens"] == together.settings["tokens"]
    with pytest.raises(UserError, match="holds its own rows"):
        compared(moved, moved, [first], text)
    assert later.reference.name == model.name


def test_an_interrupted_run_goes_on(tiny_llama: Path, text: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    from bitatlas.measure import stream

    other = rounded(tiny_llama, tmp_path / "other", 7)
    whole = compared(tmp_path / "whole", tiny_llama, [other], text, rows=20)
    rows = whole.domains[0].rows
    assert rows > stream.PART_ROWS + 2
    original, calls = stream.deviate, []

    def stopping(*args: object) -> object:
        calls.append(1)
        if len(calls) == rows + stream.PART_ROWS + 2:  # all of the noise floor, of the file a part and a row
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "deviate", stopping)
    with pytest.raises(KeyboardInterrupt):
        compared(out, tiny_llama, [other], text, rows=20)
    before = len(calls)
    again = compared(out, tiny_llama, [other], text, rows=20)
    assert len(calls) - before == rows - stream.PART_ROWS
    assert again.candidates == whole.candidates


def test_a_folder_is_of_one_reference_and_text(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    other = rounded(tiny_llama, tmp_path / "other", 7)
    compared(out, tiny_llama, [other], text)
    with pytest.raises(UserError, match=r"--out .*: holds the predictions of another reference, or on another text"):
        compared(out, tiny_llama, [other], text, rows=6)
    with pytest.raises(UserError, match="holds the predictions of another reference"):
        compared(out, other, [tiny_llama], text)
    (out / "reference" / "reference.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"reference.json: not readable"):
        compared(tmp_path / "b", out, [other])


def test_a_large_vocabulary_is_estimated_with_its_error_told(text: Path, tmp_path: Path, out: Path):
    from transformers import AutoModelForCausalLM

    model = make_checkpoint(tmp_path / "model", vocab_size=3000, scale=2.0)
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"unused{n}": n for n in range(len(vocabulary), 3000)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    other = rounded(model, tmp_path / "rounded", 15)
    result = compared(out, model, [other], text)
    seen = deviation(result)
    assert read_stream(out).vocabulary == 3000
    rows = domain_rows("text", str(text), tiny.tokenizer(), ROWS, LENGTH, 0, 3000)
    with torch.no_grad():
        p, q = (
            torch.log_softmax(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(rows.tokens).logits[:, :-1], -1)
            for folder in (model, other)
        )
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < seen.estimate_error < 0.02 * exact
    assert abs(seen.damage.mean - exact) < 5 * seen.estimate_error


# --- tasks and requirements --------------------------------------------------------------------------------------------


def test_tasks_are_paired_between_all(babyllama: Path, tmp_path: Path, out: Path):
    files = [SHARED / "models" / "stories260K", rounded(babyllama, tmp_path / "coarse", 3)]
    text = SHARED / "data" / "tinystories_test.txt"
    options = {"tasks": ("arc_easy",), "task_data": SHARED / "data", "limit": 8}
    with pytest.raises(UserError, match=r"tokenizer is not the reference's|it has 512 tokens, the reference"):
        compared(tmp_path / "b", babyllama, files, text)
    result = compared(out, babyllama, files, text, **options)
    assert [score.n for score in result.tasks] == [8, 8, 8]
    assert len(result.task_pairs) == 3  # every pair
    assert result.candidates[0].file.name == "coarse"
    assert result.candidates[1].rank is None
    assert result.candidates[1].refused
    alone = compared(tmp_path / "c", babyllama, files, "none", **options)
    assert alone.tasks == result.tasks
    assert alone.domains == []


def test_requirements_decide_the_exit_code(tiny_llama: Path, text: Path, tmp_path: Path, out: Path, monkeypatch, capsys):
    other = rounded(tiny_llama, tmp_path / "other", 7)

    def run(*words: object) -> tuple[int, str, str]:
        every = [
            "compare",
            tiny_llama,
            other,
            "--tokens",
            text,
            "--rows",
            ROWS,
            "--row-length",
            LENGTH,
            "--out",
            out,
            "-q",
            *words,
        ]
        monkeypatch.setattr("sys.argv", ["bitatlas", *map(str, every)])
        with pytest.raises(SystemExit) as raised:
            main()
        printed = capsys.readouterr()
        return int(raised.value.code or 0), printed.out, printed.err

    code, printed, error = run("--require", "other<=9.5", "--json")
    content = json.loads(printed)
    assert code == 0, error
    assert content["schema"] == "bitatlas.comparison/2"
    assert content["kept"] is True
    assert content["candidates"][0]["file"]["name"] == "other"
    code, printed, _ = run("--require", f"{other}<=1e-6")
    assert code == 1
    assert "NOT KEPT" in printed
    assert printed.strip().endswith(str(out / "compare.html"))
    assert (out / "compare.html").is_file()
    assert "| other |" in (out / "comparison.md").read_text(encoding="utf-8")
    for word, message in (("nobody<=1", "no such file here; there is other"), ("other", "write it like other<=0.02")):
        code, _, error = run("--require", word)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1


def test_python(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    other = rounded(tiny_llama, tmp_path / "other", 7)
    result = bitatlas.compare([tiny_llama, other], tokens=text, rows=ROWS, row_length=LENGTH, out=out, quiet=True)
    assert isinstance(result, bitatlas.Comparison)
    assert "<table" in result._repr_html_()
    assert "other" in result.markdown()
    assert bitatlas.Comparison.read(out) == result
    (out / "comparison.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"schema is None, expected 'bitatlas\.comparison/2'"):
        bitatlas.Comparison.read(out)


def test_what_cannot_be_compared_is_refused(tiny_llama: Path, text: Path, babyllama: Path, out: Path):
    with pytest.raises(UserError, match="nothing to compare"):
        compared(out, tiny_llama, [tiny_llama], "none")
    with pytest.raises(UserError, match="give at least one file"):
        compared(out, tiny_llama, [], text)
    with pytest.raises(UserError, match="tasks can be compared all the same"):
        compared(out, tiny_llama, [babyllama], text)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        compared(out, tiny_llama, [Path("/nowhere")], text)
    with pytest.raises(UserError, match="the model's context is 128 tokens"):
        compared(out, tiny_llama, [tiny_llama], text, row_length=256)


def test_files_of_one_name_are_told_apart(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    files = [rounded(tiny_llama, tmp_path / name / "model", steps) for name, steps in (("a", 7), ("b", 7))]
    result = compared(out, tiny_llama, [*files, files[0]], text)
    assert {c.file.name for c in result.candidates} == {"a/model", "b/model", "a/model (2)"}


# --- plans and quantized checkpoints -----------------------------------------------------------------------------------


def write_plan(model: Path, folder: Path, names: tuple[str, ...], quantizer: str = "rtn") -> Path:
    """Formats in turn, module by module."""
    folder.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(str(model), None, False)
    modules = {module.name: names[index % len(names)] for index, module in enumerate(checkpoint.modules)}
    info = PlanModel(checkpoint.info.name, None, checkpoint.info.weights_sha256)
    table = {name: FORMATS[name] for name in names}
    size = size_of(checkpoint.modules, modules, checkpoint.info)
    plan = Plan(info, table, quantizer, modules, Budget("code_bits", 3.0), size, PlanDamage(None, None))
    (folder / "plan.json").write_text(to_json(plan), encoding="utf-8")
    return folder / "plan.json"


@pytest.fixture
def plan_file(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_plan(tiny_llama, tmp_path / "survey", ("int2_g32", "int4_g32"))


def test_a_plan_is_its_checkpoint_with_its_weights(tiny_llama: Path, plan_file: Path, text: Path, tmp_path: Path):
    plan = json.loads(plan_file.read_text(encoding="utf-8"))["modules"]
    decoder = open_checkpoint(str(tiny_llama), None, False).load_model()
    bank = Bank(decoder, list(plan), "rtn")
    for module, weight in bank.weights(plan).items():
        decoder.weight(module).copy_(weight)
    decoder.model.save_pretrained(tmp_path / "written")
    tiny.tokenizer().save_pretrained(tmp_path / "written")
    arguments = [
        plan_file,
        plan_file.parent,
        tmp_path / "written",
    ]  # the file, the folder that it lies in, and the weights themselves
    result = compared(tmp_path / "out", tiny_llama, arguments, text)
    first, *others = [deviation(result, index).damage.mean for index in range(3)]
    assert others == pytest.approx([first, first], rel=1e-6)
    assert {c.rank for c in result.candidates} == {1}
    assert {c.file.family for c in result.candidates} == {"plan", "transformers"}
    of_plan = next(c.file for c in result.candidates if c.file.family == "plan")
    assert sum(kind.weights for kind in of_plan.kinds) == sum(m.weights for m in open_checkpoint(str(tiny_llama)).modules)
    assert deviation(compared(tmp_path / "turned", plan_file, [tiny_llama], text)).damage.mean > 0  # a plan as the reference


def test_a_plan_without_its_checkpoint(tiny_llama: Path, plan_file: Path, text: Path, tmp_path: Path, out: Path):
    other = write_plan(tiny_llama, tmp_path / "other", ("int8_g32",))
    with pytest.raises(UserError, match=r"neither is that among the other models nor does an atlas.json beside it say where"):
        compared(out, plan_file, [other], text)
    with pytest.raises(UserError, match=r"text.txt: "):
        compared(out, tiny_llama, [text], text)


@pytest.mark.parametrize("format_names", [("int2_g32", "int4_g32")])
def test_a_packed_checkpoint_is_its_plan(tiny_llama: Path, text: Path, tmp_path: Path, out: Path, format_names: tuple[str, ...]):
    pytest.importorskip("compressed_tensors")
    from bitatlas.export.packed import apply_plan

    plan_file = write_plan(tiny_llama, tmp_path / "survey", format_names)
    apply_plan(str(tiny_llama), plan_file, tmp_path / "packed", Reporter(quiet=True))
    result = compared(out, tiny_llama, [tmp_path / "packed", plan_file], text)
    packed, whole = (deviation(result, index).damage.mean for index in range(2))
    assert packed == pytest.approx(whole, rel=1e-4)
    file = next(c.file for c in result.candidates if c.file.family == "compressed-tensors")
    kinds = {(kind.kind, kind.format) for kind in file.kinds}
    assert ("q_proj", "compressed-tensors 2 bits, 32 a scale") in kinds
    assert ("embed_tokens", "f32") in kinds


@pytest.mark.parametrize(("method", "package"), [("aqlm", "aqlm"), ("vptq", "vptq")])
def test_a_missing_package_is_named(method: str, package: str, tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    import importlib.util

    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is here")
    other = Path(shutil.copytree(tiny_llama, tmp_path / "quantized"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "version": "gemm"}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=package) as raised:
        compared(out, tiny_llama, [other], text)
    assert "\n" not in str(raised.value)


def test_a_layout_that_nobody_knows_is_not_made_up(tiny_llama: Path, text: Path, tmp_path: Path, out: Path):
    """transformers fills them with random numbers, and warns of it at most."""
    other = Path(shutil.copytree(tiny_llama, tmp_path / "quantized"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "of the future"}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(other / "model.safetensors")
    first = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[first.replace("weight", "packed")] = tensors.pop(first)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="of the future weights are read neither by bitatlas nor by transformers"):
        compared(out, tiny_llama, [other], text)
