"""`push`: a head to the Hugging Face hub, with a model card whose figures were measured.

The card's table holds what `eval --json` and `bench --json` wrote; a head that `doctor` finds broken is not uploaded.
"""

import json
from pathlib import Path

from eagle3_xla.config import RunError, UserError
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.saved import EXPORTED

UPLOADED = ["config.json", EXPORTED, "README.md"]


def push(head: Path, target: str, repo: str, results: list[str], private: bool = False, dry_run: bool = False) -> dict:
    """Write the card to `head`/README.md and upload the head to `repo` (OWNER/NAME), unless `dry_run`.

    target: folder or hub id of the model it drafts for; results: files of `eval --json` or `bench --json`.
    Raises UserError for a head that fails a rule of `doctor`, for results that are none; RunError when the hub refuses.
    """
    head = Path(head)
    failed = [rule["message"] for rule in doctor(head, target)["rules"] if rule["status"] == "fail"]
    if failed:
        raise UserError(f"{head} fails a rule of `doctor`, so it is not uploaded: {failed[0]}")
    if not results:
        raise UserError("no results; give the output of `eval --json` or `bench --json` with --results FILE")
    figures = [_figures(Path(file)) for file in results]
    (head / "README.md").write_text(card(json.loads((head / "config.json").read_text()), target, repo, figures))
    summary = {"repo": repo, "card": str(head / "README.md"), "files": UPLOADED, "url": None}
    return summary if dry_run else summary | {"url": _upload(head, repo, private)}


def card(config: dict, target: str, repo: str, figures: list[dict]) -> str:
    """The model card. config: the head's config.json; figures: `_figures` of each file of results."""
    from huggingface_hub import EvalResult, ModelCardData

    name = target.rstrip("/").rsplit("/", 1)[-1]
    on_hub = not Path(target).exists()
    taus = [
        EvalResult(
            task_type="text-generation",
            dataset_type="prompts",
            dataset_name=row["what"],
            metric_type="acceptance_length",
            metric_value=round(row["tau"], 3),
        )
        for row in figures
    ]
    data = ModelCardData(
        model_name=repo.rsplit("/", 1)[-1],
        base_model=target if on_hub else None,
        library_name="sglang",
        pipeline_tag="text-generation",
        tags=["eagle3", "speculative-decoding", "draft-model"],
        eval_results=taus,
    )
    rows = [
        f"| {row['what']} | {row['tau']:.2f} | {' '.join(f'{share:.1%}' for share in row['acceptance'])} "
        f"| {row['speed']:.1f} | {row['speedup']} |"
        for row in figures
    ]
    table = "\n".join(rows)
    return f"""---
{data.to_yaml()}
---

# EAGLE3 draft head for {name}

A one-layer head that drafts the next tokens of `{target}` for speculative decoding; the output stays the target's own.
Draft vocabulary: {config["draft_vocab_size"]:,} of {config["vocab_size"]:,} tokens. Longest context:
{config["max_position_embeddings"]:,} tokens.

## Measured

| how | acceptance length | accepted per draft position | tokens/s | speed-up |
|---|---|---|---|---|
{table}

Acceptance length is 1 + the mean number of accepted drafts per target call. Tokens/s are those of the machine that it
was measured on.

## Serve

```bash
python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path {repo} --speculative-num-steps 5 --speculative-eagle-topk 4 \\
  --speculative-num-draft-tokens 8
vllm serve {target} \\
  --speculative-config '{{"method": "eagle3", "model": "{repo}", "num_speculative_tokens": 5}}'
```

Trained with eagle3-xla, PyTorch/XLA on TPU.
"""


def _figures(file: Path) -> dict:
    """A row of the card's table from a file of results."""
    try:
        result = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--results {file}: not the output of `eval --json` or `bench --json` ({error})") from None
    how = "greedy" if not result.get("temperature") else f"temperature {result['temperature']:g}"
    try:
        shape = f"chain of {result['draft_tokens']}" if result["topk"] == 1 else f"tree of {result['draft_tokens']}"
        what = f"{result['prompts']} prompts, {how}, {shape} drafts"
        if "tau" in result:  # eval
            speed, baseline = result["tokens_per_second"], result["baseline_tokens_per_second"]
            return {
                "what": f"own decoding, {what}",
                "tau": result["tau"],
                "acceptance": result["acceptance"],
                "speed": speed,
                "speedup": f"{speed / baseline:.2f}x" if baseline else "-",
            }
        return {
            "what": f"{result['engine']} {result['version']}, {what}",
            "tau": float(result["acceptance_length"]),
            "acceptance": result["acceptance"],
            "speed": result["tokens_per_second"],
            "speedup": f"{result['speedup']:.2f}x" if result["speedup"] else "-",
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"--results {file}: it lacks {error}; `bench` of a server without a head has none") from None


def _upload(head: Path, repo: str, private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=head, allow_patterns=UPLOADED, commit_message="Upload EAGLE3 head")
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {str(error).splitlines()[0]}") from None
    except LocalTokenNotFoundError:
        raise RunError("the hub asks who you are: `hf auth login`, or set HF_TOKEN; the card is written") from None
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"the upload to {repo} failed, start it again to finish: {reason}") from None
    return str(url)
