"""Tokens per second, memory and MFU of the whole training step on one GPU, against a straightforward eager step.

    python benchmarks/gpu.py [--target NAME_OR_DIR] [--rows 4] [--length 1024] [--draft-vocabulary 32000] [--steps 10]

The target has random weights, so that only its config.json is needed: speed does not depend on them. The ways run one
after the other on the same batch: the reference (Hugging Face forward with all hidden states, full logits, plain
autograd over all positions, torch.optim.AdamW; benchmarks/step.py), our step launched kernel by kernel, and our step as
`train --device cuda` runs it, one CUDA graph. MFU counts the arithmetic of train/flops.py, against the bf16 matmul that
this card does best (8,192 cubed, measured here). Two minutes on an H100 for a 7B target.
"""

import argparse
import gc
import time
from statistics import median

import torch
from step import eager_step

from eagle3_xla.config import load_recipe
from eagle3_xla.data.batches import drafted_positions, list_rows
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.families import plain_attention
from eagle3_xla.target.known import plan_config
from eagle3_xla.target.model import Target
from eagle3_xla.train.flops import flops_per_token
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.backend import make_backend

DOCUMENTS, QUESTION = 4, 0.4  # conversations in a row, and the share of each that the user wrote


def random_target(config):
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=plain_attention(config)
        )
    return model.eval().requires_grad_(False)


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    part = length // DOCUMENTS
    within = torch.arange(length) % part
    batch = {
        "input_ids": torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)),
        "position_ids": within.repeat(rows, 1),
        "document_ids": (torch.arange(length) // part + 1).repeat(rows, 1),
        "loss_mask": (within >= QUESTION * part).repeat(rows, 1),
    }
    capacity = int(drafted_positions(batch["loss_mask"].numpy()).sum())
    return batch | list_rows(batch["loss_mask"], 1, capacity)


def our_step(model, recipe, batch, draft_ids, captured: bool):
    backend = make_backend(recipe.xla)
    if not captured:
        backend.compile = lambda function, state=(): function
    target = backend.place_target(Target(model, draft_ids))
    head = backend.place_head(Eagle3Head(draft_config(model.config, len(draft_ids))))
    optimizer = Optimizer(head, recipe.train, 1000, backend, {})
    step = TrainStep(recipe, backend, target, head, *d2t_t2d(draft_ids, model.config.vocab_size), optimizer)
    placed = backend.put(batch)
    return lambda: step.run(0, placed)


def measured(step, steps: int) -> tuple[float, float]:
    """(seconds of a step, most GB in use); every step is awaited, as no training would."""
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(3 + steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[3:]), torch.cuda.max_memory_allocated() / 1e9


def matmul_flops() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds, _ = measured(lambda: a @ b, 10)
    return 2 * 8192**3 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--draft-vocabulary", type=int, default=32000)
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    settings = ["xla.device=cuda", "xla.autocast=true", f"loss.ttt_length={arguments.ttt_length}"]
    settings += [f"data.row_length={arguments.length}", f"data.draft_vocab_size={arguments.draft_vocabulary}"]
    recipe = load_recipe(None, settings)
    config = plan_config(arguments.target)
    peak = matmul_flops()
    work = flops_per_token(config, recipe)
    print(f"{torch.cuda.get_device_name()}: a bf16 matmul of 8,192 cubed {peak / 1e12:.0f} TFLOP/s", flush=True)
    print(f"{arguments.target}, {arguments.rows} rows of {arguments.length}, {work / 1e9:.2f} GFLOP a position\n")
    batch = random_batch(arguments.rows, arguments.length, config.vocab_size)
    draft_ids = torch.arange(arguments.draft_vocabulary)
    model = random_target(config)
    placed = {name: x.to("cuda") for name, x in batch.items()}

    def reference():
        step = eager_step(model, placed, arguments.draft_vocabulary, arguments.ttt_length, wait=False)

        def with_autocast():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                step()

        return with_autocast

    ways = {
        "straightforward eager": reference,
        "ours, kernel by kernel": lambda: our_step(model, recipe, batch, draft_ids, captured=False),
        "ours, as `train` runs it": lambda: our_step(model, recipe, batch, draft_ids, captured=True),
    }
    print("| step | ms | tokens/s | against eager | MFU | peak GB |\n|---|---|---|---|---|---|", flush=True)
    tokens, eager = arguments.rows * arguments.length, None
    for name, make in ways.items():
        try:
            seconds, gigabytes = measured(make(), arguments.steps)
        except torch.cuda.OutOfMemoryError:
            print(f"| {name} | out of memory | | | | |", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        eager = seconds if make is reference else eager
        against = f"{eager / seconds:.2f}" if eager else ""  # it may have run out of memory
        speed = tokens / seconds
        print(
            f"| {name} | {seconds * 1e3:.1f} | {speed:,.0f} | {against} | {speed * work / peak:.0%} "
            f"| {gigabytes:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
