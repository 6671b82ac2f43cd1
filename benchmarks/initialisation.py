"""What the start of a head is worth: held-out expected tau before training and after an epoch, per `train.init`.

    python benchmarks/initialisation.py --target quickstart/target --work /tmp/initialisation

Every run sees the same rows, states and schedule. Also printed: how unequal the channels of the aux states are.
"""

import argparse
import json
from pathlib import Path

from safetensors import safe_open

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.train.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--target", required=True)
parser.add_argument("--work", required=True)
parser.add_argument("--tokens", type=int, default=30_000)
parser.add_argument("--epochs", type=int, default=1)
options = parser.parse_args()

for init in ("random", "target", "least_squares"):
    out = Path(options.work) / init
    settings = [f"target.path={options.target}", f"data.prepared={options.work}/data", f"train.out={out}"]
    settings += [f"data.max_tokens={options.tokens}", f"train.epochs={options.epochs}", f"train.init={init}"]
    recipe = load_recipe("smollm2-cpu", [*settings, "xla.device=cpu", "train.tracker=none"])
    prepare(recipe)
    train(recipe)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taus = {row["step"]: round(row["heldout_tau"], 3) for row in rows if "heldout_tau" in row}
    print(f"{init:>14}: held-out expected tau by step {taus}", flush=True)

with safe_open(out / "initial" / "step-00000000" / "state.safetensors", "pt") as state:
    rms = 1 / state.get_tensor("optimizer.lr_scale.fc.weight")
print(f"RMS of the aux channels: median {rms.median():.2f}, largest {rms.max():.0f}")
