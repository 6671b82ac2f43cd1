"""The model card of a head: every figure in it comes from a file, and names of foreign files can't write into it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from eagle3_xla.checks import escaped
from eagle3_xla.doctor.engines import TREE, served_by
from eagle3_xla.doctor.weight_rules import EMBEDDING
from eagle3_xla.draft.saved import SavedHead, layers_of
from eagle3_xla.evaluate.results import Figures
from eagle3_xla.serve.run_facts import RunFacts
from eagle3_xla.target.families import SGLANG, SGLANG_JAX, VLLM, aux_layers

ALL_POSITIONS = """Others report `acc_k`: how often the head's first choice at TTT step k is the target's, on given
text and over all positions, the user's turns included. That is no acceptance. For comparison, k = 0, 1, ...:"""
NO_PARAMETERS = ("d2t", "t2d", EMBEDDING)


class Licences(NamedTuple):
    """Identifiers such as apache-2.0; "" and () where none is known."""

    head: str
    target: str
    data: tuple[str, ...]


def card(
    head: SavedHead,
    target: Any,
    base: str | None,
    repo: str,
    results: list[Figures],
    facts: RunFacts,
    licences: Licences,
    report: str = "",
) -> str:
    """target: doctor's Target; base: its hub id, None for a folder that has none; report: name of the page that lies
    beside the card, "" for none."""
    name = base.rsplit("/", 1)[-1] if base else Path(target.name).name
    served, config, shown = base or "TARGET", head.config, f"`{base}`" if base else f"the model {escaped(name)}"
    parameters = sum(value.numel() for name, value in head.tensors.items() if name not in NO_PARAMETERS)
    default = list(aux_layers(target.config.num_hidden_layers))
    layers = list(layers_of(head, target.config.num_hidden_layers) or default)
    mapped = "; target id = row + d2t[row]" if "d2t" in head.tensors else ""
    embedding = "" if EMBEDDING in head.tensors else "\nThe embedding is the target's and is not in the file.\n"
    rows = "\n".join(
        f"| {escaped(row.how)} | {row.tau:.2f} | {' '.join(f'{share:.1%}' for share in row.acceptance)} "
        f"| {row.tokens_per_second:.1f} | {f'{row.speedup:.2f}x' if row.speedup else '-'} |"
        for row in results
    )
    accuracies: dict[str, str] = {}  # of the head on given text, so a chain and a tree have the same
    for row in results:
        accuracies.setdefault(" / ".join(f"{share:.1%}" for share in row.acc_all_positions), row.how)
    others = [f"- {escaped(how)}: {shares}" for shares, how in accuracies.items() if shares]
    all_positions = "\n".join(["", ALL_POSITIONS, "", *others, ""]) if others else ""
    return f"""---
{_metadata(base, repo, results, licences.head)}
---

# EAGLE3 draft head for {escaped(name)}

A one-layer head that drafts the next tokens of {shown} for speculative decoding; the target checks every draft, and the
output stays the target's own.

## Measured

| how | acceptance length | accepted per draft position | tokens/s | speed-up |
|---|---|---|---|---|
{rows}

Acceptance length is 1 + the mean number of accepted drafts per target call; the share at a draft position is of all
target calls. Tokens/s and speed-up are those of the machine that they were measured on, against the same without a
head; "-" where there is none, or where the answers were not the same.
{f"Figures by category and drafted answers: [{report}]({report})." + chr(10) if report else ""}{all_positions}
## Serve

{_commands(head, target.config, served, repo)}
## Method

EAGLE-3 (training-time test): the head reads hidden states of three of the target's layers at its first step and its own
hidden state at the steps after it, as an engine drafts, and learns the target's distribution over a vocabulary of the
commonest tokens. The target stays frozen.
{facts.sections}
## Architecture

| | |
|---|---|
| parameters | {parameters:,} |
| layers | 1, hidden size {config["hidden_size"]:,}, {config["num_attention_heads"]} attention heads |
| draft vocabulary | {config["draft_vocab_size"]:,} of {config["vocab_size"]:,} tokens{mapped} |
| longest context | {config.get("max_position_embeddings", 2048):,} tokens |
| reads | outputs of the target's layers {layers}, 0-based; indices {[i + 1 for i in layers]} of `hidden_states` |
{embedding}
## Limitations

The head drafts well on text like what it was trained on: another language, domain or chat template, or a context
longer than its training rows, is drafted worse and never answered otherwise. Acceptance was measured on the prompts
named above and on no others.{"".join(f" {limit}" for limit in facts.limits)}

## Licence

{_licences(licences)}

## Citation

```bibtex
@article{{li2025eagle3,
  title   = {{EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test}},
  author  = {{Li, Yuhui and Wei, Fangyun and Zhang, Chao and Zhang, Hongyang}},
  journal = {{arXiv preprint arXiv:2503.01840}},
  year    = {{2025}}
}}
```
"""


def _commands(head: SavedHead, target: Any, served: str, repo: str) -> str:
    """For the engines that serve them. target: its config; served: its name there."""
    engines = served_by(head, target)
    of_sglang, of_vllm = TREE | engines.get(SGLANG, {}), engines.get(VLLM, {})

    def options(named: dict[str, Any]) -> str:
        return "".join(f" \\\n  {name} {value}" for name, value in named.items())

    arguments = "".join(
        f"\n        {name.removeprefix('--').replace('-', '_')}={json.dumps(value)},"
        for name, value in of_sglang.items()
    )
    sglang = f"""SGLang:

```bash
python -m sglang.launch_server --model-path {served} --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path {repo} --dtype bfloat16{options(of_sglang)}
```
"""
    patched = ", with the patch of `eagle3-xla patch apply --engine sglang-jax`" if target.model_type == "qwen2" else ""
    sglang_jax = f"""sglang-jax, on a TPU{patched}:

```bash
python -m sgl_jax.launch_server --model-path {served} --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path {repo} --speculative-num-steps 3 --speculative-eagle-topk 1 \\
  --speculative-num-draft-tokens 4 --dtype bfloat16
```
"""
    vllm = f"""vLLM:

```bash
vllm serve {served} \\
  --speculative-config '{{"method": "eagle3", "model": "{repo}", "num_speculative_tokens": 5}}'{options(of_vllm)}
```
"""
    python = f"""Python, in SGLang:

```python
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path="{served}",
        dtype="bfloat16",
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path="{repo}",{arguments}
    )
    print(engine.generate("The capital of France is", {{"temperature": 0, "max_new_tokens": 32}})["text"])
```
"""
    blocks = ((SGLANG, sglang), (SGLANG_JAX, sglang_jax), (VLLM, vllm), (SGLANG, python))
    none = f"No released engine is known to hand the hidden states of {target.model_type} to a head.\n"
    return "\n".join(block for engine, block in blocks if engine in engines) or none


def _licences(licences: Licences) -> str:
    known = {"head": licences.head, "target": licences.target, "training data": ", ".join(licences.data)}
    lines = [f"The {of}: {escaped(licence)}." for of, licence in known.items() if licence]
    if not (licences.target and licences.data):
        lines.append("What is not named here keeps its own licence.")
    return " ".join(lines)


def _metadata(base: str | None, repo: str, results: list[Figures], licence: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    taus = [
        EvalResult(
            task_type="text-generation",
            dataset_type="prompts",
            dataset_name=row.how,
            dataset_config=row.how,  # by which the hub tells results apart; the name is what it shows
            metric_type="acceptance_length",
            metric_value=round(row.tau, 3),
        )
        for row in results
    ]
    data = ModelCardData(
        model_name=repo.rsplit("/", 1)[-1],
        base_model=base,
        license=licence or None,
        library_name="eagle3-xla",
        pipeline_tag="text-generation",
        tags=["eagle3", "speculative-decoding", "draft-model"],
        eval_results=taus,
    )
    return data.to_yaml()
