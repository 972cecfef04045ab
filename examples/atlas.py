"""What a survey found, from Python: where the damage is, plans of three sizes, and what each is worth.

    python examples/atlas.py demo-out

The folder is that of any finished survey (`make demo` makes demo-out). Nothing is measured: everything comes from the atlas.
"""

import sys

import bitatlas


def main(folder: str) -> None:
    atlas = bitatlas.Atlas.read(folder)
    print(f"{atlas.model.name}: {atlas.model.layers} layers, {atlas.model.quantizable_weights:,} weights that can be quantized")
    for uniform in atlas.uniform:
        print(f"  {uniform.format} everywhere: {uniform.size.total_bytes:,} bytes, {uniform.damage.mean:.3f} nats/token")

    worst = max(atlas.layers, key=lambda layer: layer.criticality.mean)
    low, high = worst.criticality.ci95
    print(
        f"layer {worst.layer} does {worst.criticality.mean:.1f} [{low:.1f}, {high:.1f}] times the harm of its size: {worst.verdict}"
    )

    least, most = (next(u.size.code_bits for u in atlas.uniform if u.format == name) for name in (atlas.low, atlas.high))
    for part in (0.25, 0.5, 0.75):
        plan = atlas.replan(code_bits=least + part * (most - least))
        wide = sum(name == atlas.high for name in plan.modules.values())
        print(
            f"{plan.size.code_bits:.2f} code bits: {plan.size.total_bytes:,} bytes, predicted {plan.damage.predicted:.3f} nats/token, "
            f"{wide} of {len(plan.modules)} modules at {atlas.high}"
        )

    best = atlas.best()
    if best is not None and best.damage.measured is not None:
        print(f"the survey's own plan, measured on text that did not find it: {best.damage.measured.mean:.3f} nats/token")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
