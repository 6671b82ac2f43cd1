"""What the start of a head is worth: held-out expected tau before training and after each epoch, per `train.init`.

    python benchmarks/initialisation.py --target quickstart/target --work /tmp/initialisation

Takes about 20 minutes on two cores; every run sees the same rows, states and schedule.
"""

import argparse
import json
from pathlib import Path

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.train.loop import train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--target", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--epochs", type=int, default=1)
options = parser.parse_args()

for init in ("random", "target", "least_squares"):
    out = Path(options.work) / init
    settings = [f"target.path={options.target}", f"data.prepared={options.work}/data", f"train.out={out}"]
    settings += [f"train.init={init}", f"train.epochs={options.epochs}", "xla.device=cpu", "train.tracker=none"]
    recipe = load_recipe("smollm2-cpu", settings)
    prepare(recipe)
    train(recipe)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taus = {row["step"]: round(row["heldout_tau"], 3) for row in rows if "heldout_tau" in row}
    print(f"{init:>14}: held-out expected tau by step {taus}", flush=True)
