"""What the command line teaches: examples in each verb's help, and the next step that each verb ends with."""

import json
import shlex
from argparse import Namespace

from eagle3_xla import storage
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.errors import UserError

OWN_DATA = "--data.prepared=work/data '--data.train=[my-chats.jsonl]' '--data.heldout=[my-heldout.jsonl]'"
SMALL = "--config smollm2-cpu --target.path=quickstart/target"
LARGE = "--config qwen2.5-7b-v4-32 --data.prepared=gs://my-bucket/data"
SEARCHED = {"xla": ("dp", "tp", "draft_data_parallel", "remat"), "train": ("batch_size", "gradient_accumulation")}
EXAMPLES = {
    "quickstart": """
  eagle3-xla quickstart                      what fits the default budget
  eagle3-xla quickstart --minutes 2 --out quickstart-2          a smaller head, sooner
  eagle3-xla quickstart --out /tmp/try       everything in another folder""",
    "prepare": f"""
  eagle3-xla prepare {SMALL} {OWN_DATA}
  eagle3-xla prepare {LARGE}
  eagle3-xla prepare {SMALL} {OWN_DATA} --show 3""",
    "regenerate": """
  eagle3-xla regenerate --server http://127.0.0.1:30000 --config qwen2.5-7b-v4-32 --out work/chats
  eagle3-xla regenerate --target quickstart/target --chats my-chats.jsonl --out work/chats""",
    "train": f"""
  eagle3-xla train {SMALL} --data.prepared=work/data --train.out=work/run
  eagle3-xla train {SMALL} --data.prepared=work/data --train.out=work/run --max-steps 20
  torchrun --nproc-per-node=1 -m eagle3_xla train {LARGE} --train.out=gs://my-bucket/run""",
    "plan": """
  eagle3-xla plan --config qwen2.5-7b-v4-32
  eagle3-xla plan --config qwen2.5-7b-v4-32 --topology v5e-16
  eagle3-xla plan --config qwen2.5-7b-v4-32 --search --plan.price_per_chip_hour=3.22""",
    "export": """
  eagle3-xla export --checkpoint work/run --out work/head                        the run's best checkpoint
  eagle3-xla export --checkpoint work/run/checkpoints/step-00000400 --out work/head --dtype float32""",
    "doctor": """
  eagle3-xla doctor work/head --target quickstart/target
  eagle3-xla doctor some-head --target Qwen/Qwen2.5-7B-Instruct --fix""",
    "eval": """
  eagle3-xla eval --target quickstart/target --draft work/head --prompts prompts.jsonl --limit 20
  eagle3-xla eval --target T --draft H --prompts prompts.jsonl --topk 4 --draft-tokens 7        a tree
  eagle3-xla eval --target T --draft H --prompts mt-bench --turns 0 --thinking off              every turn of a set
  eagle3-xla eval --target T --draft H --prompts prompts.jsonl --batch-size 1 --draft-tokens auto
  eagle3-xla eval --target T --draft H --prompts prompts.jsonl --temperature 0.7 --json > eval.json
  eagle3-xla eval --target T --draft H --prompts prompts.jsonl --report work/report --run work/run""",
    "patch": """
  eagle3-xla patch check
  eagle3-xla patch apply --engine sglang-jax --path /path/to/sglang-jax""",
    "bench": """
  eagle3-xla bench --server http://127.0.0.1:30000 --prompts prompts.jsonl --concurrency 1,4,16
  eagle3-xla bench --server http://127.0.0.1:30000 --prompts prompts.jsonl --baseline http://127.0.0.1:30001""",
    "gap": """
  eagle3-xla gap --server http://127.0.0.1:30000 --prompts prompts.jsonl --target T --draft H --limit 20""",
    "push": """
  eagle3-xla push work/head --target T --repo me/my-head --results eval.json --run work/run --dry-run
  eagle3-xla push work/head --target T --repo me/my-head --results eval.json --license apache-2.0
  eagle3-xla push work/head --target T --repo me/my-head --results eval.json --benchmark p.jsonl=me/prompts:chat""",
    "config": """
  eagle3-xla config                                              the recipes that ship
  eagle3-xla config --show qwen2.5-7b-v4-32 --train.lr=4e-4      resolved settings, each with its meaning
  eagle3-xla config --diff qwen2.5-7b-v4-32 qwen2.5-7b-v4-32-fast""",
}


def next_step(options: Namespace, overrides: list[str], result: dict) -> str:
    """The command, or the look at something, that follows on a verb's result."""
    named = (options.diff or [options.show])[-1] if options.verb == "config" else getattr(options, "config", None)
    recipe, given = load_recipe(named, overrides), _recipe(named, overrides)
    prepared = _if_empty(recipe.data.prepared, "data.prepared", "DATA")
    match options.verb:
        case "quickstart":
            target = shlex.quote(f"--target.path={options.out}/target")
            return f"your own chats: eagle3-xla prepare --config smollm2-cpu {target} {OWN_DATA}"
        case "prepare":
            return f"eagle3-xla train{given}{_if_empty(recipe.train.out, 'train.out', 'RUN')}"
        case "regenerate":
            chats = json.dumps(f"{options.out.rstrip('/')}/chats.jsonl", ensure_ascii=False)  # which YAML reads too
            if options.target and not any(override.startswith("target.path=") for override in overrides):
                given += f" --target.path={shlex.quote(options.target)}"
            else:
                given += _if_empty(recipe.target.path, "target.path", "TARGET")
            given += " --data.conversations=0" if recipe.data.conversations else ""  # its mix is in these chats already
            return f"eagle3-xla prepare{given}{prepared} " + shlex.quote(f"--data.train=[{chats}]")
        case "plan" if options.search and result["best"] is None:
            return _larger(result["topology"], given)
        case "plan" if options.search:
            return _training(recipe, given, _chosen(recipe, result["best"]), result["best"])
        case "plan" if result["fits"]:
            return _training(recipe, given, "", result)
        case "plan":
            return f"eagle3-xla plan{given} --search"
        case "train" if result.get("ended") in ("SIGTERM", "SIGINT", "max_steps"):
            return f"the same command again, it continues: eagle3-xla train{given}"
        case "train":
            return f"eagle3-xla export --checkpoint {shlex.quote(recipe.train.out)} --out HEAD"
        case "export":
            return f"eagle3-xla doctor {shlex.quote(options.out)} --target TARGET"
        case "doctor" if result.get("ok"):
            pair = f"--target {shlex.quote(options.target)} --draft {shlex.quote(options.head)}"
            return f"eagle3-xla eval {pair} --prompts PROMPTS.jsonl"
        case "doctor" if result["fixable"] and not options.fix:
            copied, head = _here(options.head)
            return f"{copied}eagle3-xla doctor {shlex.quote(head)} --target {shlex.quote(options.target)} --fix"
        case "doctor":
            return "config.json alone does not mend it: export again from the checkpoint, eagle3-xla export"
        case "eval":
            return _served(options.target, options.draft, options.prompts, result["served_by"])
        case "patch" if result.get("status") == "needed":
            return "eagle3-xla patch apply" + (f" --path {shlex.quote(options.path)}" if options.path else "")
        case "patch" if result.get("engine") == "sglang-jax":
            return "SGLANG_JAX=CHECKOUT bash launch/serve_sglang_jax.sh --target TARGET --head HEAD"
        case "patch":
            return "bash launch/serve_sglang.sh --target TARGET --head HEAD"
        case "bench":
            return f"eagle3-xla gap {_asked(options)} --target TARGET --draft HEAD"
        case "gap" if result.get("ok"):
            copied, *names = _here(options.target, options.draft)
            target, head = map(shlex.quote, names)
            bench = f"eagle3-xla bench {_asked(options)} --target {target} --draft {head} --json > bench.json"
            push = f"eagle3-xla push {head} --target {target} --repo OWNER/NAME --results bench.json --dry-run"
            return f"{copied}{bench}, then {push}"
        case "gap":
            return f"eagle3-xla doctor {shlex.quote(options.draft)} --target {shlex.quote(options.target)}"
        case "push" if options.dry_run:
            return f"read {result.get('card')}, then the same command without --dry-run"
        case "push":
            return f"look at {result.get('url')}"
        case "config" if named is None:
            return "eagle3-xla plan --config RECIPE"
        case "config" if _can_be_planned(recipe):
            return f"eagle3-xla plan{given}"
        case "config":
            target = _if_empty(recipe.target.path, "target.path", "TARGET")
            return f"eagle3-xla prepare{given}{target}{prepared}"
    raise AssertionError(options.verb)


def _here(*locations: str) -> tuple[str, ...]:
    """What is to be done first with those in a bucket, and what each is called then: engines, `push` and --fix take
    folders of a machine."""
    away = [location for location in locations if storage.is_url(location)]
    names = [storage.base_name(location) if location in away else location for location in locations]
    if len(set(names)) < len(names):
        names = ["target", "head"]
    return f"copy {' and '.join(away)} to this machine, then " if away else "", *names


def _asked(options: Namespace) -> str:
    """The server and the prompts of `bench` and `gap`."""
    return f"--server {shlex.quote(options.server)} --prompts {shlex.quote(options.prompts)}"


def _served(target: str, head: str, prompts: str, engines: dict[str, dict[str, int | str]]) -> str:
    """The command that serves the pair. engines: as doctor/engines.py has them."""
    name = next((name for name in engines if name.startswith(("SGLang", "vLLM"))), None)
    if name is None:
        return "no released engine is known to serve this pair; eagle3-xla doctor says why"
    copied, target, head = _here(target, head)
    if name.startswith("SGLang"):
        command = f"bash launch/serve_sglang.sh --target {shlex.quote(target)} --head {shlex.quote(head)}"
    else:
        speculative = json.dumps({"method": "eagle3", "model": head, "num_speculative_tokens": 5})
        command = f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(speculative)}"
    command += "".join(f" {option} {value}" for option, value in engines[name].items())
    return f"{copied}{command}, then eagle3-xla bench --server URL --prompts {shlex.quote(prompts)}"


def _recipe(named: str | None, overrides: list[str]) -> str:
    """The recipe's part of a command, as a shell reads it back."""
    words = ["--config", named] if named else []
    words += [f"--{override}" for override in overrides]
    return "".join(f" {shlex.quote(word)}" for word in words)


def _if_empty(value: str, name: str, placeholder: str) -> str:
    """A setting that the next command needs and the recipe lacks."""
    return "" if value else f" --{name}={placeholder}"


def _can_be_planned(recipe: Recipe) -> bool:
    """Whether `plan` takes its target, device and mesh."""
    from eagle3_xla.xla.tpu import find_topology

    try:
        chips = find_topology(recipe.plan.topology).chips
    except UserError:
        return False
    return bool(recipe.target.path) and recipe.xla.device == "xla" and recipe.xla.dp * recipe.xla.tp == chips


def _training(recipe: Recipe, given: str, chosen: str, verdict: dict) -> str:
    """What trains on the slice, after `prepare` where nothing is prepared. given, chosen: the recipe's part of the
    command, and settings over it; verdict: of `plan`."""
    prepared = _if_empty(recipe.data.prepared, "data.prepared", "gs://BUCKET/data")
    out = _if_empty(recipe.train.out, "train.out", "gs://BUCKET/run")
    first = f"eagle3-xla prepare{given}{prepared}, then " if verdict["tokens_of"] != "data.prepared" else ""
    return f"{first}bash launch/train_torchrun.sh --slice{given}{chosen}{prepared}{out}"


def _chosen(recipe: Recipe, best: dict) -> str:
    """The settings in which the best of a search differs from its recipe."""
    names = [(section, name) for section, names in SEARCHED.items() for name in names]
    changed = [(section, name) for section, name in names if best[name] != getattr(getattr(recipe, section), name)]
    return "".join(f" --{section}.{name}={json.dumps(best[name])}" for section, name in changed)


def _larger(name: str, given: str) -> str:
    """A search over the smallest slice of twice the memory."""
    from eagle3_xla.xla.tpu import TOPOLOGIES

    memory = {topology.name: topology.chips * topology.chip.hbm_bytes for topology in TOPOLOGIES.values()}
    larger = [other for other in memory if memory[other] >= 2 * memory[name]]
    if not larger:
        return f"nothing fits {name}, and no known slice is twice as large; a shorter data.row_length needs less"
    smallest = min(larger, key=lambda other: memory[other])
    return f"nothing fits {name}; on a larger slice: eagle3-xla plan{given} --search --topology {smallest}"
