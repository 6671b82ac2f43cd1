"""Host time of a compiled step: traced at every call, and run by its graph's hash.

    python benchmarks/dispatch.py [--dp 2 --tp 2] [--layers 28]

The target has the depth of Qwen2.5-7B and negligible width, the head 7 TTT steps, so that the device has next to
nothing to do. Both step in turns in one process. Host seconds are until the call returns; "until done" until the
metrics are on the host. CPU seconds of all threads, the device's included, stand beside them: they do not grow when
the machine has other work. The limit that it is held to is 15 ms.
"""

import argparse
import os
import time
from statistics import median

os.environ.setdefault("PJRT_DEVICE", "CPU")
import torch

from eagle3_xla.config import load_recipe
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import Target
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.backend import make_backend

LENGTH, VOCABULARY, DRAFT_VOCABULARY = 32, 256, 64


def make_step(recipe, backend, layers: int) -> TrainStep:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, vocab_size=VOCABULARY, **sizes))
    draft_ids = torch.arange(DRAFT_VOCABULARY)
    target = backend.place_target(Target(model.eval().requires_grad_(False), draft_ids))
    head = backend.place_head(Eagle3Head(draft_config(model.config, DRAFT_VOCABULARY)))
    optimizer = Optimizer(head, recipe.train, 1000, backend, {})
    return TrainStep(recipe, backend, target, head, *d2t_t2d(draft_ids, VOCABULARY), optimizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    recipe = load_recipe("smollm2-cpu", ["loss.ttt_length=7", f"xla.dp={options.dp}", f"xla.tp={options.tp}"])
    backend = make_backend(recipe.xla)
    import torch_xla

    by_hash = make_step(recipe, backend, options.layers)
    compile_ = backend.compile
    backend.compile = lambda function, state=(): torch_xla.compile(function, full_graph=True, name=function.__name__)
    traced = make_step(recipe, backend, options.layers)
    backend.compile = compile_
    rows = torch.arange(LENGTH, dtype=torch.int32)[None].repeat(options.dp, 1)
    batch = {"input_ids": rows, "position_ids": rows, "document_ids": torch.ones_like(rows), "loss_mask": rows >= 0}
    placed = backend.put(batch)
    backend.settle()
    kinds = {"traced at every call": traced, "by its hash": by_hash}
    for step in kinds.values():  # compiled, and traced as often as dispatch wants to see the graph
        for _ in range(3):
            float(step.run(0, placed)[0][0])
    figures = {name: [] for name in kinds}
    for _ in range(options.steps):
        for name, step in kinds.items():
            started, cpu = time.perf_counter(), time.process_time()
            metrics, _ = step.run(0, placed)
            returned = time.perf_counter()
            loss = float(metrics[0])
            figures[name].append((returned - started, time.perf_counter() - started, time.process_time() - cpu, loss))
    assert [row[3] for row in figures["by its hash"]] == [row[3] for row in figures["traced at every call"]]
    print(f"{options.layers} layers, TTT 7, {backend.description}, {options.steps} steps; median, most of:")
    for name, measured in figures.items():
        host, done, cpu, _ = zip(*measured)
        print(
            f"{name:>22}: host {median(host) * 1e3:6.1f}, {max(host) * 1e3:6.1f} ms; until done "
            f"{median(done) * 1e3:6.1f}, {max(done) * 1e3:6.1f} ms; CPU {median(cpu) * 1e3:6.1f} ms"
        )


if __name__ == "__main__":
    main()
