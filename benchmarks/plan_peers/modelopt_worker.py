"""Runs inside ModelOpt's own environment: one auto_quantize search, its chosen bits written down.

    python modelopt_worker.py REQUEST.json ANSWER.json

Every module may take either width and must take one of them (`module_search_spaces` without "no quantization"), q/k/v and gate/up may differ
(the grouping rules for TensorRT-LLM are emptied, as all other methods have that freedom), and a disabled lm_head is taken out of the cost
model, so that `effective_bits` is the benchmark's code bits. ModelOpt's integer formats are symmetric; "mse" calibration clips
them as the benchmark's own round to nearest does. This file imports nothing of bitatlas: its environment has none of it.

Source: nvidia-modelopt 0.47 (github.com/NVIDIA/Model-Optimizer), `modelopt.torch.quantization.auto_quantize`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH_ROWS = 8


def formats_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    """One custom configuration a width: integer codes in blocks of the group size, activations left alone."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "block_sizes": {-1: request["group_size"]}}},
                {"quantizer_name": "*input_quantizer", "enable": False},
            ],
            "algorithm": request["calibration"],
        }
        for bits in request["bits"]
    ]


def search(request: dict[str, Any]) -> dict[str, Any]:
    """{"modules": module -> bits, "seconds", "effective_bits", "versions"}; the request's keys are those of `outside.request_of`."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher, AutoQuantizeKLDivSearcher
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    rows = torch.tensor(request["ids"])  # [rows, tokens]
    batches = [{"input_ids": part, "labels": part} for part in rows.split(BATCH_ROWS)]
    AutoQuantizeGradientSearcher.quant_grouping_rules = AutoQuantizeKLDivSearcher.quant_grouping_rules = []
    scoring, formats = request["scoring"], formats_of(request)

    def forward_step(model: Any, batch: dict[str, Any]) -> Any:
        output = model(**batch)
        return output if scoring == "gradient" else output.logits

    start = time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": request["code_bits"], "cost": {"excluded_module_name_patterns": ["*lm_head*"]}},
        quantization_formats=formats,
        module_search_spaces=[
            {"module_name_patterns": request["modules"], "quantization_formats": formats, "allow_no_quant": False}
        ],
        data_loader=batches,
        forward_step=forward_step,
        loss_func=(lambda output, batch: output.loss) if scoring == "gradient" else None,
        disabled_layers=["*lm_head*"],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method=scoring,
        checkpoint=request["checkpoint"],
    )
    seconds = time.perf_counter() - start
    best = state["best"]
    return {
        "recipe": {name: str(recipe) for name, recipe in best["recipe"].items()},
        "seconds": seconds,
        "effective_bits": best["constraints"]["effective_bits"],
        "versions": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
    }


if __name__ == "__main__":
    answer = search(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
