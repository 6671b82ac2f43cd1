"""Tokens per second of the whole training step, against eager torch and against a plain matmul on this machine.

    python benchmarks/step.py --target quickstart/target [--specjax FOLDER | --traced]

The step is `train`'s own: frozen target, teacher, TTT unroll, backward, AdamW, at the sizes of the embedded target
(B=4, T=512, TTT 7, draft vocabulary 8,192), one device. The reference is a straightforward eager step of the same maths
(Hugging Face forward with all hidden states, full logits, torch.optim.AdamW). Each runs in a process of its own, so
that its peak memory is its own, and they step in turns, so that a slow minute of the machine slows them all. The batch
is packed before, so that `datasets` is in none of them. GFLOP per token is counted from the matmuls (2 per
multiply-add, backward twice the forward; attention left out).

--specjax: a checkout of github.com/tails-mpt/SpecJAX (measured: commit d047ed4, jax 0.7.1 and optax 0.2.8, which is not
among this project's packages), the JAX trainer for TPUs, in turn with the others.
--traced: instead of all of them the compiled step as it is, run by its graph's hash, and the same traced at every call.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

BATCH, LENGTH, TTT, DRAFT_VOCABULARY = 4, 512, 7, 8192
TOKENS = BATCH * LENGTH
EAGER, SPECJAX, TRACED = "eager reference", "SpecJAX", "ours, XLA, traced at every call"
OURS = {
    "ours, plain torch": ["xla.device=cpu"],
    "ours, plain torch in bfloat16": ["xla.device=cpu", "xla.autocast=true", "target.dtype=bfloat16"],
    "ours, XLA": ["xla.device=xla"],
    "ours, XLA, xla.remat": ["xla.device=xla", "xla.remat=true"],
    TRACED: ["xla.device=xla"],
}


def gflop_per_token(config) -> dict[str, float]:
    """Matmul GFLOP per token by part."""
    size, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * (size // config.num_attention_heads)
    layer = size * size * 2 + 2 * size * kv + 3 * size * inner
    head = 2 * size * (size + 2 * kv) + size * size + 3 * size * inner + size * DRAFT_VOCABULARY
    parts = {
        "target forward": layers * layer,
        "full-vocabulary argmax and logsumexp": size * config.vocab_size,
        "teacher rows": size * DRAFT_VOCABULARY,
        "draft, 7 steps forward and backward": 3 * (3 * size * size + TTT * head),
    }
    return {name: 2 * macs / 1e9 for name, macs in parts.items()}


def write_batch(path: str, everywhere: bool, file: str) -> None:
    """Pack the shipped chats and write one batch to `file`: the measured processes do not load `datasets`."""
    from eagle3_xla.config import load_recipe
    from eagle3_xla.data.batches import Batches, drafted_positions, list_rows, to_tensors
    from eagle3_xla.data.prepare import load_prepared, prepare

    settings = [f"target.path={path}", f"data.row_length={LENGTH}", "data.max_tokens=0", "data.deduplicate=none"]
    settings += [f"data.prepared={Path(tempfile.gettempdir()) / 'eagle3-xla-benchmark-rows'}"]
    recipe = load_recipe("smollm2-cpu", settings)
    prepare(recipe)
    rows = load_prepared(recipe.data.prepared)[0]
    batches = Batches(drafted_positions(rows["loss_mask"][:]).sum(1), [(LENGTH, 0, len(rows))], BATCH, 1, 0)
    batch = to_tensors(rows[batches.indices(0)])
    capacity = batches.capacities(1)[LENGTH]  # positions that are listed at most in the whole run
    if everywhere:
        batch["loss_mask"][:] = True
    elif capacity < TOKENS:
        batch |= list_rows(batch["loss_mask"], 1, capacity)
    save_file(batch, file)


def our_step(path: str, batch: dict[str, torch.Tensor], kind: str):
    from eagle3_xla.config import load_recipe
    from eagle3_xla.data.vocab import d2t_t2d
    from eagle3_xla.draft.model import Eagle3Head, draft_config
    from eagle3_xla.target.model import open_target
    from eagle3_xla.train.optimizer import Optimizer
    from eagle3_xla.train.step import TrainStep
    from eagle3_xla.xla.backend import make_backend

    recipe = load_recipe("smollm2-cpu", [f"loss.ttt_length={TTT}", *OURS[kind]])
    backend = make_backend(recipe.xla)
    if kind == TRACED:
        import torch_xla

        backend.compile = lambda function, state=(): torch_xla.compile(function, full_graph=True)
    draft_ids = torch.arange(DRAFT_VOCABULARY)
    target = backend.place_target(open_target(path, getattr(torch, recipe.target.dtype), draft_ids))
    config = target.model.config
    head = backend.place_head(Eagle3Head(draft_config(config, DRAFT_VOCABULARY)))
    optimizer = Optimizer(head, recipe.train, 1000, backend, {})
    step = TrainStep(recipe, backend, target, head, *d2t_t2d(draft_ids, config.vocab_size), optimizer)
    backend.settle()
    return lambda: float(step.run(0, backend.put(batch))[0][0])


def eager_step(model, batch: dict[str, torch.Tensor], draft_vocabulary: int, ttt: int, wait: bool = True):
    """The reference: what a first version in plain torch would do. wait: for each loss on the host."""
    from eagle3_xla.draft.model import Eagle3Head, draft_config
    from eagle3_xla.target.families import aux_layers
    from eagle3_xla.target.model import document_masks

    length = batch["input_ids"].shape[1]
    head = Eagle3Head(draft_config(model.config, draft_vocabulary)).to(model.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=8e-4)
    ids, positions, answer = batch["input_ids"].long(), batch["position_ids"].long(), batch["loss_mask"]
    masks = document_masks(model.config, batch["document_ids"])
    mask = masks["full_attention"]
    groups = head.config.num_attention_heads // head.config.num_key_value_heads
    scale = head.config.head_dim**-0.5

    def shift(x, by):
        return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], 1)

    def step():
        with torch.no_grad():
            output = model(
                ids, position_ids=positions, attention_mask=masks, output_hidden_states=True, use_cache=False
            )
            aux = torch.cat([output.hidden_states[i + 1] for i in aux_layers(model.config.num_hidden_layers)], -1)
            full = output.logits
            in_vocabulary = full.argmax(-1) < draft_vocabulary
            teacher = full[..., :draft_vocabulary].softmax(-1)
        hidden, keys, values, loss, drafted = head.fc(aux), [], [], 0.0, shift(answer, 1)
        for k in range(ttt):
            embeds = model.get_input_embeddings()(shift(ids, 1 + k))

            def attend(query, key, value):
                query, key, value = (x.transpose(1, 2) for x in (query, key, value))
                keys.append(key.repeat_interleave(groups, 1))
                values.append(value.repeat_interleave(groups, 1))
                scores = [(query @ keys[0].transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))]
                scores += [(query * key).sum(-1, keepdim=True) * scale for key in keys[1:]]
                weights = torch.cat(scores, -1).softmax(-1)
                out = weights[..., :length] @ values[0]
                for i, value in enumerate(values[1:]):
                    out = out + weights[..., length + i : length + i + 1] * value
                return out.transpose(1, 2)

            hidden = head.midlayer(head.embedded(embeds), hidden, head.rotary(hidden, positions + k), attend)
            drafted = drafted & shift(answer, 2 + k)
            rows = (drafted & shift(in_vocabulary, 1 + k)).float()
            cross_entropy = -(shift(teacher, 1 + k) * head.logits(hidden).log_softmax(-1)).sum(-1)
            loss = loss + 0.8**k * (cross_entropy * rows).sum() / rows.sum().clamp_min(1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        return float(loss.detach()) if wait else None

    return step


def specjax_step(folder: str, path: str, batch: dict[str, torch.Tensor]):
    """SpecJAX's compiled step and what its loop does after it (specjax/train.py): bf16 weights but for the norms, every
    position trained, optax's AdamW. A target without an lm_head of its own gets its embedding for that.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, folder)
    import jax
    import optax
    from specjax.models.draft.eagle3 import load_eagle3_params
    from specjax.models.target import get_target
    from specjax.train import _eagle3_config_from_target, make_train_step_ttt
    from specjax.training.optimizer import build_optimizer
    from specjax.training.vocab import build_t2d_map

    load, forward = get_target("qwen2")
    weights, config = load(path)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    draft = _eagle3_config_from_target(config, "qwen2")
    draft.draft_vocab_size = DRAFT_VOCABULARY
    parameters, _, draft = load_eagle3_params(None, jax.random.PRNGKey(0), draft)
    parameters = {name: x.astype("float32") if x.ndim == 1 else x for name, x in parameters.items()}
    draft_ids = jax.numpy.arange(DRAFT_VOCABULARY)
    maps = draft_ids, build_t2d_map(draft_ids, config.vocab_size, DRAFT_VOCABULARY)
    optimizer, _ = build_optimizer(8e-4, 30, 1000)
    state = optimizer.init(parameters)
    train_step = make_train_step_ttt(forward, config, draft, TTT)
    ids = batch["input_ids"].int().numpy()
    inputs = {"input_ids": ids, "attention_mask": (ids >= 0).astype("int32")}

    def step():
        nonlocal parameters, state
        loss, losses, accuracies, gradients = train_step(parameters, weights, *maps, inputs)
        loss = float(loss)
        updates, state = optimizer.update(gradients, state, parameters)
        parameters = jax.block_until_ready(optax.apply_updates(parameters, updates))
        return loss

    return step


def matmul_gflops() -> float:
    """A large float32 matmul with every core: this machine's practical peak."""
    a, b = torch.randn(2048, 576), torch.randn(576, 8192)
    a @ b
    started, count = time.perf_counter(), 20
    for _ in range(count):
        a @ b
    return count * 2 * 2048 * 576 * 8192 / (time.perf_counter() - started) / 1e9


def serve(kind: str, path: str, batch_file: str, specjax: str | None) -> None:
    """In a process of its own: one step now and one for each line of stdin; what each took."""
    batch = load_file(batch_file)
    if kind == EAGER:
        from eagle3_xla.target.model import load_target

        step = eager_step(load_target(path, torch.float32), batch, DRAFT_VOCABULARY, TTT)
    elif kind == SPECJAX:
        step = specjax_step(specjax, path, batch)
    else:
        step = our_step(path, batch, kind)
    while True:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        step()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        took = {
            "seconds": seconds,
            "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "system": after.ru_stime - before.ru_stime,
            "faults": after.ru_minflt - before.ru_minflt,
        }
        # Not getrusage: a process inherits its parent's peak there.
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        print(json.dumps(took | {"peak_gb": peak / 1e9}), flush=True)
        if not sys.stdin.readline():
            return


def middle(measured: list[dict], name: str) -> float:
    return median(step[name] for step in measured)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--everywhere", action="store_true", help="let every position count, the user's too")
    parser.add_argument("--specjax", metavar="FOLDER", help="a checkout of SpecJAX, to be measured too")
    parser.add_argument("--traced", action="store_true", help="the compiled step, by its hash and traced, alone")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # one of the kinds, and the batch's file
    options = parser.parse_args()
    if options.serve:
        kind, file = options.serve
        return serve(kind, options.target, file, options.specjax)
    from transformers import AutoConfig

    kinds = (EAGER, *[kind for kind in OURS if kind != TRACED], *[SPECJAX] * bool(options.specjax))
    kinds = ("ours, XLA", TRACED) if options.traced else kinds
    parts = gflop_per_token(AutoConfig.from_pretrained(options.target))
    total = sum(parts.values())
    for name, gflop in parts.items():
        print(f"  {gflop / total:6.1%} of the matmul work: {name} ({gflop:.3f} GFLOP per token)")
    with tempfile.TemporaryDirectory() as folder:
        batch_file = f"{folder}/batch.safetensors"
        write_batch(options.target, options.everywhere, batch_file)
        processes, first, steps, matmuls = {}, {}, {}, []
        for kind in kinds:
            command = [sys.executable, __file__, "--target", options.target, "--serve", kind, batch_file]
            command += ["--specjax", options.specjax] if options.specjax else []
            processes[kind] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            first[kind], steps[kind] = json.loads(processes[kind].stdout.readline()), []
            print("step", file=processes[kind].stdin, flush=True)  # the second step still takes new memory
            processes[kind].stdout.readline()
        for _ in range(options.rounds):  # in turns: what the machine does meanwhile meets them all
            matmuls.append(matmul_gflops())
            for kind, process in processes.items():
                print("step", file=process.stdin, flush=True)
                steps[kind].append(json.loads(process.stdout.readline()))
        for process in processes.values():
            process.communicate()
    peak = median(matmuls)
    print(f"plain matmul: {peak:.0f} GFLOP/s")
    for kind, measured in steps.items():
        speed = TOKENS / median(step["seconds"] for step in measured)
        ratio = median(its_first["seconds"] / its["seconds"] for its_first, its in zip(steps[kinds[0]], measured))
        print(
            f"{kind:>31}: {speed:6.1f} tokens/s, {ratio:.2f}x the first, {speed * total:5.1f} GFLOP/s = "
            f"{speed * total / peak:.0%} of the matmul's, first step {first[kind]['seconds']:.0f} s, "
            f"peak {measured[-1]['peak_gb']:.2f} GB; a step: {middle(measured, 'cpu'):.1f} CPU s, "
            f"{middle(measured, 'system'):.2f} of them the system's, {middle(measured, 'faults'):,.0f} page faults"
        )


if __name__ == "__main__":
    main()
