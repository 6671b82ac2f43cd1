"""The command line: eagle3-xla VERB [--config RECIPE] [--section.key=value ...]. One verb is one function elsewhere.

Exit codes: 0 done; 1 a failure that the message explains; 2 bad usage or bad input.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from safetensors import SafetensorError

from eagle3_xla import __version__
from eagle3_xla.config import RunError, UserError, load_recipe, recipe_names


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's C++ side logs compiler chatter as errors
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        overrides = _overrides(rest, options)
        # Everything a library prints goes to stderr: stdout carries the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            result = VERBS[options.verb](options, overrides)
    except UserError as error:
        print(f"eagle3-xla {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"eagle3-xla {options.verb}: interrupted; start it again to continue", file=sys.stderr)
        return 1
    except (RunError, OSError, SafetensorError) as error:  # the second: safetensors on a full disk
        print(f"eagle3-xla {options.verb}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({key: value for key, value in result.items() if key != "screen"}))
    else:
        print(result["screen"] if "screen" in result else _table(result))
    return 1 if result.get("ok") is False else 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    recipe = argparse.ArgumentParser(add_help=False, parents=[common])
    recipe.add_argument("--config", metavar="RECIPE", help=f"a YAML file or one of: {', '.join(recipe_names())}")
    parser = argparse.ArgumentParser(
        prog="eagle3-xla",
        description="EAGLE3 draft heads, trained with PyTorch/XLA and carried into the engines that serve them.",
        epilog="Verbs that take a recipe also take --section.key=value for every setting in it.",
    )
    parser.add_argument("--version", action="version", version=f"eagle3-xla {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "quickstart", parents=[common], help="the whole pipeline on this machine, with a small target"
    )
    verb.add_argument("--out", default="quickstart", help="folder for everything (default: quickstart)")
    verb.add_argument(
        "--minutes", type=float, default=None, help="train about so long (default: what fits 20 minutes in all)"
    )

    verb = verbs.add_parser("prepare", parents=[recipe], help="chats -> packed rows and the draft vocabulary")
    verb.add_argument("--show", type=int, metavar="N", help="then print N rows, what is trained on in colour")
    verb = verbs.add_parser("regenerate", parents=[recipe], help="the target rewrites the answers of chats")
    verb.add_argument("--server", default="", metavar="URL[,URL]", help="running OpenAI-compatible servers")
    verb.add_argument("--target", default="", metavar="DIR", help="or a small target to run in this process")
    verb.add_argument("--chats", nargs="+", default=[], metavar="FILE", help="default: the recipe's data.train mix")
    verb.add_argument("--out", required=True, help="folder; started again with it, it continues")
    verb.add_argument("--limit", type=int, default=0, help="only the first conversations")
    verb.add_argument("--concurrency", type=int, default=16, help="conversations in flight (default: 16)")
    verb.add_argument("--max-tokens", type=int, default=1024, help="of an answer (default: 1024)")
    verb.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--timeout", type=float, default=600, help="seconds of an answer, before it is asked again")
    verb.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of --target")

    verb = verbs.add_parser("train", parents=[recipe], help="train a head; continues by itself")
    verb.add_argument("--max-steps", type=int, default=0, help="save and stop after so many further micro-steps")
    verb.add_argument("--device", choices=("xla", "cpu", "cuda"), help="short for --xla.device")
    verb.add_argument("--allow-recompile", action="store_true", help="go on when a step compiles again")
    verb.add_argument("--profile", action="store_true", help="write a trace of three steps to train.out/profile")

    verb = verbs.add_parser("plan", parents=[recipe], help="what the TPU compiler says of a recipe; no TPU needed")
    verb.add_argument("--topology", help="v4-32, v5e-16, ... instead of the recipe's plan.topology")
    verb.add_argument("--search", action="store_true", help="compare meshes and batch shapes that keep the maths")

    verb = verbs.add_parser("export", parents=[common], help="a checkpoint -> the directory that engines load")
    verb.add_argument("--checkpoint", required=True, help="a checkpoint folder, or a run's folder (its best)")
    verb.add_argument("--out", required=True)
    verb.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")

    verb = verbs.add_parser("doctor", parents=[common], help="check a head against the rules of every engine")
    verb.add_argument("head", metavar="DIR", help="an exported head, ours or anyone's")
    verb.add_argument("--target", required=True, help="folder or hub id of the model it drafts for")
    verb.add_argument("--fix", action="store_true", help="mend what config.json gets wrong, where that is safe")

    verb = verbs.add_parser("eval", parents=[common], help="acceptance of a head, from real decoding")
    verb.add_argument("--target", required=True)
    verb.add_argument("--draft", required=True, help="an exported head")
    verb.add_argument("--prompts", required=True, help="JSONL; the first user turn of each row is asked")
    verb.add_argument("--limit", type=int, default=0, help="only the first prompts")
    verb.add_argument("--max-new-tokens", type=int, default=128)
    verb.add_argument("--draft-tokens", type=int, default=5, help="drafts checked in a target call (default: 5)")
    verb.add_argument("--topk", type=int, default=1, help="drafts per node: 1 is a chain (default), more a tree")
    verb.add_argument("--steps", type=int, default=0, help="depth of a tree (default: 5)")
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    verb.add_argument("--top-p", type=float, default=1.0)
    verb.add_argument("--seed", type=int, default=0, help="of sampled answers")
    verb.add_argument("--device", default="cpu", choices=("cpu", "cuda"))

    verb = verbs.add_parser("patch", parents=[common], help="what an installed SGLang or sglang-jax lacks for Qwen2")
    verb.add_argument("action", choices=("check", "apply", "revert"))
    verb.add_argument("--engine", help="sglang or sglang-jax (default: the one that is there)")
    verb.add_argument("--path", help="a checkout, a virtual environment or site-packages (default: installed here)")

    server = argparse.ArgumentParser(add_help=False, parents=[common])
    server.add_argument("--server", required=True, metavar="URL", help="a running SGLang or vLLM server")
    server.add_argument("--prompts", required=True, help="JSONL; the first user turn of each row is asked")
    server.add_argument("--limit", type=int, default=0, help="only the first prompts")

    verb = verbs.add_parser("bench", parents=[server], help="acceptance length and speed of a running server")
    verb.add_argument("--baseline", default="", metavar="URL", help="the same server without the head: gives speed-up")
    verb.add_argument("--target", default="", help="whose chat template (default: the one that the server names)")
    verb.add_argument("--concurrency", default="1", help="requests in flight, such as 1,4,16 (default: 1)")
    verb.add_argument("--max-new-tokens", type=int, default=128)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    verb.add_argument("--top-p", type=float, default=1.0)

    verb = verbs.add_parser("gap", parents=[server], help="served against offline acceptance; names the cause")
    verb.add_argument("--target", required=True)
    verb.add_argument("--draft", required=True, help="the exported head that the server serves")
    verb.add_argument("--max-new-tokens", type=int, default=128)
    verb.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the offline side")

    verb = verbs.add_parser("push", parents=[common], help="a head to the hub, with a card of measured figures")
    verb.add_argument("head", metavar="DIR", help="an exported head")
    verb.add_argument("--target", required=True, help="folder or hub id of the model it drafts for")
    verb.add_argument("--repo", required=True, metavar="OWNER/NAME")
    verb.add_argument("--results", action="append", default=[], metavar="FILE", help="of eval --json or bench --json")
    verb.add_argument("--private", action="store_true")
    verb.add_argument("--dry-run", action="store_true", help="write the card, upload nothing")
    return parser


def _overrides(rest: list[str], options) -> list[str]:
    """`--section.key=value` arguments as OmegaConf reads them. Anything else is bad usage."""
    takes_recipe = hasattr(options, "config")
    overrides = []
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not (takes_recipe and argument.startswith("--") and "." in name and equals):
            form = "; settings are given as --section.key=value" if takes_recipe else ""
            raise UserError(f"unknown argument {argument}{form}")
        overrides.append(f"{name}={value}")
    return overrides


def _table(result: dict) -> str:
    width = max(len(key) for key in result)
    return "\n".join(f"{key:<{width}}  {_show(value)}" for key, value in result.items())


def _show(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_show(item) for item in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


# The modules are imported by the verb that needs them: `--help` and a typing error answer at once.
def _quickstart(options, overrides) -> dict:
    from eagle3_xla.quickstart import quickstart

    return quickstart(Path(options.out), options.minutes)


def _prepare(options, overrides) -> dict:
    from eagle3_xla.data.prepare import prepare
    from eagle3_xla.target.families import load_target_config

    recipe = load_recipe(options.config, overrides)
    load_target_config(recipe.target.path)  # before data is read
    manifest = prepare(recipe)
    if options.show is None:
        return manifest
    from eagle3_xla.data.show import show_rows

    return manifest | {"screen": show_rows(recipe, options.show)}


def _regenerate(options, overrides) -> dict:
    from eagle3_xla.regenerate.run import Options, Sampling, regenerate

    sampling = Sampling(options.temperature, options.top_p, options.max_tokens, options.seed)
    names = "target chats limit concurrency timeout device".split()
    given = {name: getattr(options, name) for name in names}
    servers = [url for url in options.server.split(",") if url]
    return regenerate(
        load_recipe(options.config, overrides), Path(options.out), Options(servers, sampling=sampling, **given)
    )


def _train(options, overrides) -> dict:
    overrides += [f"xla.device={options.device}"] if options.device else []
    recipe = load_recipe(options.config, overrides)
    from eagle3_xla.train.loop import train

    return train(recipe, options.max_steps, options.allow_recompile, options.profile)


def _plan(options, overrides) -> dict:
    from eagle3_xla.plan.search import search
    from eagle3_xla.plan.verdict import plan

    overrides += [f"plan.topology='{options.topology}'"] if options.topology else []
    return (search if options.search else plan)(load_recipe(options.config, overrides))


def _export(options, overrides) -> dict:
    from eagle3_xla.export import export

    return export(Path(options.checkpoint), Path(options.out), options.dtype)


def _eval(options, overrides) -> dict:
    from eagle3_xla.evaluate.run import EvalOptions, evaluate

    names = "limit max_new_tokens draft_tokens topk steps temperature top_p seed device".split()
    settings = EvalOptions(**{name: getattr(options, name) for name in names})
    return evaluate(options.target, options.draft, options.prompts, settings)


def _doctor(options, overrides) -> dict:
    from eagle3_xla.doctor.run import doctor

    return doctor(Path(options.head), options.target, options.fix)


def _patch(options, overrides) -> dict:
    from eagle3_xla.serve.patch import patch

    return patch(options.action, options.engine, options.path)


def _bench(options, overrides) -> dict:
    from eagle3_xla.serve.bench import BenchOptions, bench
    from eagle3_xla.serve.client import Request

    try:
        concurrency = [int(number) for number in options.concurrency.split(",")]
    except ValueError:
        raise UserError(f"--concurrency {options.concurrency}: numbers such as 1,4,16 are expected") from None
    request = Request(options.max_new_tokens, options.temperature, options.top_p)
    settings = BenchOptions(options.limit, concurrency, options.target, request)
    return bench(options.server, options.prompts, settings, options.baseline)


def _gap(options, overrides) -> dict:
    from eagle3_xla.evaluate.run import EvalOptions
    from eagle3_xla.serve.gap import gap

    settings = EvalOptions(options.limit, options.max_new_tokens, dtype=options.dtype)
    return gap(options.target, options.draft, options.prompts, options.server, settings)


def _push(options, overrides) -> dict:
    from eagle3_xla.serve.push import push

    return push(Path(options.head), options.target, options.repo, options.results, options.private, options.dry_run)


VERBS = {
    "quickstart": _quickstart,
    "prepare": _prepare,
    "regenerate": _regenerate,
    "plan": _plan,
    "train": _train,
    "export": _export,
    "eval": _eval,
    "doctor": _doctor,
    "patch": _patch,
    "bench": _bench,
    "gap": _gap,
    "push": _push,
}
