"""The verbs and their options, and what their numbers may be."""

import argparse
import difflib
import math
import re
from typing import Any, NoReturn

import shtab

from eagle3_xla import __version__
from eagle3_xla.checks import expected, number
from eagle3_xla.config import expand_home, recipe_names
from eagle3_xla.data.prompts import SETS
from eagle3_xla.errors import UserError
from eagle3_xla.guide import EXAMPLES


class Usage(UserError):
    """Bad usage; the message begins with the program and its verb."""


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, instead of argparse's usage text and an exit."""

    given: list[str] = []

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings | {"allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = list(args or [])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        words = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if words.startswith("VERB invalid") and self.given[0].startswith("-"):
            words = f"{self.given[0]} comes after the verb"
        elif match := re.match(r"VERB invalid choice: '(.*)' \(choose from (.*)\)", words, re.DOTALL):
            near = difflib.get_close_matches(match[1], match[2].replace("'", "").split(", "), n=1)
            words = f"no verb {match[1]!r}; " + (f"did you mean {near[0]}?" if near else f"one of {match[2]}")
        elif "required" in words:  # perhaps it is there, but misspelt
            if words.endswith(": VERB"):
                verbs = next(each.choices for each in self._actions if isinstance(each, argparse._SubParsersAction))
                words = f"no verb; one of {', '.join(verbs)}"
            given = [word.partition("=")[0] for word in self.given if word.startswith("--")]
            for option in (option for option in given if "." not in option):  # those are settings
                near = difflib.get_close_matches(option, self._option_string_actions, n=1)
                if near and option not in self._option_string_actions:
                    words = f"unknown argument {option}; did you mean {near[0]}?"
        raise Usage(f"{self.prog}: {words}")


class Number:
    """An argument's type: a finite number in its range. argparse puts the option's name before the message."""

    def __init__(self, kind: type, least: float = -math.inf, most: float = math.inf, above: bool = False):
        self.kind = kind
        self.bounds: dict[str, Any] = {"least": least, "most": most, "whole": kind is int, "above": above}

    def __call__(self, words: str) -> float:
        try:
            return number(self.kind(words), words, **self.bounds)
        except ValueError:  # a UserError is one
            raise argparse.ArgumentTypeError(f"{words}: {expected(**self.bounds)} is expected") from None


def numbers(words: str) -> list[int]:
    """Requests in flight: 1,4,16."""
    return [int(IN_FLIGHT(part)) for part in words.split(",")]


def drafts(words: str) -> int:
    """A number of drafts, 0 for `auto`."""
    return 0 if words == "auto" else int(DRAFTS(words))


COUNT, SIZE, SEED = Number(int, 0), Number(int, 1), Number(int, 0, 2**63 - 1)
DRAFTS, IN_FLIGHT, SECONDS = Number(int, 1, 1024), Number(int, 1, 10_000), Number(float, 0, above=True)
TEMPERATURE, TOP_P = Number(float, 0, 100), Number(float, 0, 1, above=True)


# What a shell completes: options that take a file or a folder, and recipes by name.
FILES, FOLDERS = (
    ("--prompts", "--results", "--chats", "--report"),
    ("--target", "--draft", "--out", "--checkpoint", "--run", "--path"),
)


def parser() -> Parser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    how_much = common.add_mutually_exclusive_group()
    how_much.add_argument("--quiet", action="store_true", help="print the result and errors alone, no progress")
    how_much.add_argument("--verbose", action="store_true", help="print what libraries log, and the trace of an error")
    recipe = Parser(add_help=False, parents=[common])
    recipe.add_argument("--config", metavar="RECIPE", help="a YAML file or a shipped recipe (eagle3-xla config)")
    root = Parser(
        prog="eagle3-xla",
        description="EAGLE3 draft heads, trained with PyTorch/XLA and carried into the engines that serve them.",
        epilog="Verbs that take a recipe also take --section.key=value for every setting in it "
        "(eagle3-xla config --show RECIPE). Examples: eagle3-xla VERB --help. "
        'Completion: eval "$(eagle3-xla --print-completion bash)".',
    )
    root.add_argument("--version", action="version", version=f"eagle3-xla {__version__}")
    recipes = " ".join(recipe_names())
    completed = f'_eagle3_xla_recipes() {{ compgen -W "{recipes}" -- "$1"; compgen -f -- "$1"; }}'
    shtab.add_argument_to(root, "--print-completion", preamble={"bash": completed}, help="of a shell, for its settings")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_verbs(verbs, common, recipe)
    for verb in verbs.choices.values():
        for action in verb._actions:
            if "--config" in action.option_strings:
                completion: Any = {"bash": "_eagle3_xla_recipes", "zsh": f"({recipes})"}
            elif {*FILES} & {*action.option_strings}:
                completion = shtab.FILE
            elif {*FOLDERS} & {*action.option_strings} or action.metavar == "DIR":
                completion = shtab.DIRECTORY
            else:
                continue
            action.type = expand_home
            action.complete = completion  # type: ignore[attr-defined]  # where shtab looks for it
    return root


def option_names(verb: str) -> list[str]:
    """The options of a verb, as they are written."""
    found = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return [name for action in found.choices[verb]._actions for name in action.option_strings]


class _Verbs:
    """add_parser with the verb's examples below its options."""

    def __init__(self, verbs: Any):
        self.verbs = verbs

    def add_parser(self, name: str, parents: list, help: str) -> Parser:
        layout = argparse.RawDescriptionHelpFormatter
        description, epilog = help[0].upper() + help[1:] + ".", f"examples:{EXAMPLES[name]}"
        return self.verbs.add_parser(
            name, parents=parents, help=help, description=description, epilog=epilog, formatter_class=layout
        )


def _add_verbs(subparsers: Any, common: Parser, recipe: Parser) -> None:
    verbs = _Verbs(subparsers)
    verb = verbs.add_parser(
        "quickstart", parents=[common], help="the whole pipeline on this machine, with a small target"
    )
    verb.add_argument("--out", default="quickstart", help="folder for everything (default: quickstart)")
    verb.add_argument(
        "--minutes",
        type=Number(float, 0.1, 100_000),
        default=None,
        help="train about so long (default: what fits 8 minutes in all)",
    )

    verb = verbs.add_parser("prepare", parents=[recipe], help="chats -> packed rows and the draft vocabulary")
    verb.add_argument("--overwrite", action="store_true", help="write into a folder that holds other things")
    verb.add_argument("--show", type=SIZE, metavar="N", help="then print N rows, what is trained on in colour")
    verb = verbs.add_parser("regenerate", parents=[recipe], help="the target rewrites the answers of chats")
    verb.add_argument("--server", default="", metavar="URL[,URL]", help="running OpenAI-compatible servers")
    verb.add_argument("--target", default="", help="or folder or hub id of a small target to run in this process")
    verb.add_argument("--chats", nargs="+", default=[], metavar="FILE", help="default: the recipe's data.train mix")
    verb.add_argument("--out", required=True, help="folder; started again with it, it continues")
    verb.add_argument("--limit", type=COUNT, default=0, help="only the first conversations")
    verb.add_argument("--concurrency", type=IN_FLIGHT, default=16, help="conversations in flight (default: 16)")
    verb.add_argument("--max-tokens", type=SIZE, default=1024, help="of an answer (default: 1024)")
    verb.add_argument("--temperature", type=TEMPERATURE, default=0.7, help="0 is greedy (default: 0.7)")
    verb.add_argument("--top-p", type=TOP_P, default=1.0)
    verb.add_argument("--seed", type=SEED, default=0)
    verb.add_argument("--timeout", type=SECONDS, default=600, help="seconds of an answer, before it is asked again")
    verb.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of --target")
    verb.add_argument("--api-key-env", default="", metavar="NAME", help="variable whose value the servers get as key")

    verb = verbs.add_parser("train", parents=[recipe], help="train a head; continues by itself")
    verb.add_argument("--max-steps", type=COUNT, default=0, help="save and stop after so many further micro-steps")
    verb.add_argument("--device", choices=("xla", "cpu", "cuda"), help="short for --xla.device")
    verb.add_argument("--allow-recompile", action="store_true", help="go on when a step compiles again")
    verb.add_argument("--profile", action="store_true", help="write a trace of three steps to train.out/profile")

    verb = verbs.add_parser("plan", parents=[recipe], help="what the TPU compiler says of a recipe; no TPU needed")
    verb.add_argument("--topology", help="v4-32, v5e-16, ... instead of the recipe's plan.topology")
    verb.add_argument("--search", action="store_true", help="compare meshes and batch shapes that keep the maths")
    verb.add_argument(
        "--xla-flags", default="", metavar="FLAGS", help="of the TPU compiler: xla_A=B, several in quotes"
    )

    verb = verbs.add_parser("export", parents=[common], help="a checkpoint -> the directory that engines load")
    verb.add_argument("--checkpoint", required=True, help="a checkpoint folder, or a run's folder (its best)")
    verb.add_argument("--out", required=True)
    dtypes = ("bfloat16", "float16", "float32")
    verb.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of the weights (default: bfloat16)")

    verb = verbs.add_parser("doctor", parents=[common], help="check a head against the rules of every engine")
    verb.add_argument("head", metavar="DIR", help="an exported head, ours or anyone's")
    verb.add_argument("--target", required=True, help="folder or hub id of the model it drafts for")
    verb.add_argument("--fix", action="store_true", help="mend what config.json gets wrong, where that is safe")

    verb = verbs.add_parser("eval", parents=[common], help="acceptance of a head, from real decoding")
    verb.add_argument("--target", required=True)
    verb.add_argument("--draft", required=True, help="an exported head")
    verb.add_argument("--prompts", required=True, help="a file, or " + ", ".join(SETS) + " from the hub")
    verb.add_argument("--limit", type=COUNT, default=0, help="only the first prompts")
    verb.add_argument(
        "--turns", type=COUNT, default=1, help="user turns asked, each after the target's answer (default: 1; 0: all)"
    )
    verb.add_argument("--thinking", default="", choices=("on", "off"), help="default: the chat template's own")
    verb.add_argument("--max-new-tokens", type=SIZE, default=128)
    verb.add_argument(
        "--draft-tokens",
        type=drafts,
        default=5,
        metavar="N|auto",
        help="drafts checked in a target call (default: 5); auto: the chain that is fastest on this machine",
    )
    verb.add_argument("--topk", type=DRAFTS, default=1, help="drafts per node: 1 is a chain (default), more a tree")
    verb.add_argument("--steps", type=COUNT, default=0, help="depth of a tree (default: 5)")
    verb.add_argument(
        "--draft-window",
        type=COUNT,
        default=0,
        help="positions that the head sees, its own included (default: as its config.json says)",
    )
    verb.add_argument("--batch-size", type=SIZE, default=16, help="prompts decoded at once (default: 16)")
    verb.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy (default)")
    verb.add_argument("--top-p", type=TOP_P, default=1.0)
    verb.add_argument("--seed", type=SEED, default=0, help="of sampled answers")
    verb.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    verb.add_argument("--force", action="store_true", help="measure a head that `doctor` fails")
    verb.add_argument("--report", default="", metavar="DIR", help="write report.html there: figures, answers in colour")
    verb.add_argument("--run", default="", metavar="DIR", help="the head's training run, for the report's curves")

    verb = verbs.add_parser("patch", parents=[common], help="what an installed SGLang or sglang-jax lacks for Qwen2")
    verb.add_argument("action", choices=("check", "apply", "revert"))
    verb.add_argument("--engine", help="sglang or sglang-jax (default: the one that is there)")
    verb.add_argument("--path", help="a checkout, a virtual environment or site-packages (default: installed here)")

    server = Parser(add_help=False, parents=[common])
    server.add_argument("--server", required=True, metavar="URL", help="a running SGLang or vLLM server")
    server.add_argument("--prompts", required=True, help="JSONL; the first user turn of each row is asked")
    server.add_argument("--limit", type=COUNT, default=0, help="only the first prompts")

    verb = verbs.add_parser("bench", parents=[server], help="acceptance length and speed of a running server")
    verb.add_argument("--baseline", default="", metavar="URL", help="the same server without the head: gives speed-up")
    verb.add_argument("--draft", default="", metavar="DIR", help="the head (default: the one that the server names)")
    verb.add_argument("--target", default="", help="whose chat template (default: the one that the server names)")
    verb.add_argument(
        "--concurrency", type=numbers, default=[1], help="requests in flight, such as 1,4,16 (default: 1)"
    )
    verb.add_argument("--max-new-tokens", type=SIZE, default=128)
    verb.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy (default)")
    verb.add_argument("--top-p", type=TOP_P, default=1.0)

    verb = verbs.add_parser("gap", parents=[server], help="served against offline acceptance; names the cause")
    verb.add_argument("--target", required=True)
    verb.add_argument("--draft", required=True, help="the exported head that the server serves")
    verb.add_argument("--max-new-tokens", type=SIZE, default=128)
    verb.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the offline side")
    verb.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the offline side")

    verb = verbs.add_parser("push", parents=[common], help="a head to the hub, with a card of measured figures")
    verb.add_argument("head", metavar="DIR", help="an exported head")
    verb.add_argument("--target", required=True, help="folder or hub id of the model it drafts for")
    verb.add_argument("--repo", required=True, metavar="OWNER/NAME")
    verb.add_argument("--results", action="append", default=[], metavar="FILE", help="of eval --json or bench --json")
    verb.add_argument("--run", default="", metavar="DIR", help="the run that the head comes from (train.out)")
    verb.add_argument("--report", default="", metavar="FILE", help="the page of eval --report, uploaded with the head")
    verb.add_argument("--base-model", default="", metavar="OWNER/NAME", help="hub id of a target that is a folder")
    verb.add_argument("--license", default="", metavar="ID", help="of the head, such as apache-2.0")
    verb.add_argument("--target-license", default="", metavar="ID", help="default: what the target's README.md says")
    verb.add_argument("--data-license", action="append", default=[], metavar="ID", help="of the chats; once for each")
    verb.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="PROMPTS=OWNER/NAME:TASK",
        help="also write .eval_results/: results on PROMPTS are scores of that benchmark on the hub, whose values must "
        "be acceptance lengths",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace files that were not written by us")
    verb.add_argument("--private", action="store_true")
    verb.add_argument("--dry-run", action="store_true", help="write the card, upload nothing")

    verb = verbs.add_parser("config", parents=[common], help="recipes: which there are, what is in one, how two differ")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--show", metavar="RECIPE", help="every setting of it, resolved, with its meaning")
    which.add_argument("--diff", nargs=2, metavar="RECIPE", help="settings in which two recipes differ")
    verb.set_defaults(config=None)
