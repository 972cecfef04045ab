"""Parts of `benchmarks/peers.py`: every method that chooses bits, found on the same rows and judged by the same meter.

problem.py            a checkpoint, its budget, its rows: the same for everybody
rules.py              peers' rules in plain numbers, re-implemented from what they do
scores.py             the gradients and KLs that those rules ask for
search.py             swap search on true KL: the practical limit
own.py                one rule in one process
outside.py            AutoRound, ModelOpt and bitatlas itself, each in a process of its own
autoround_worker.py   runs in AutoRound's environment
modelopt_worker.py    runs in ModelOpt's environment
measure.py            runs a command; its time and peak memory
judging.py            sizes and damage of the plans that came back
results.py            the JSON file: settings, finished cells, intervals, ratios
table.py              docs/peers.md from that JSON
"""
