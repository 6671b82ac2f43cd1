"""The command line: eagle3-xla VERB [--config RECIPE] [--section.key=value ...]. One verb is one function elsewhere.

Exit codes: 0 done; 1 a failure that the message explains; 2 bad usage or bad input.
"""

import contextlib
import dataclasses
import difflib
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from eagle3_xla import __version__
from eagle3_xla.arguments import Usage, option_names, parser
from eagle3_xla.checks import in_colour, of_this_machine, printable, without_credentials
from eagle3_xla.config import load_recipe
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.guide import next_step

RAISE = "EAGLE3_XLA_RAISE"  # set: an unexpected error ends in its traceback; the tests run so
CONTINUED = ("quickstart", "prepare", "regenerate", "train")  # and plan --search: a second start goes on with the first


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's C++ side logs compiler chatter as errors
    arguments = sys.argv[1:] if arguments is None else arguments
    program, options = "eagle3-xla", Namespace(verb="")
    try:
        options, rest = parser().parse_known_args(arguments)
        program = f"eagle3-xla {options.verb}"
        overrides = _overrides(rest, options)
        with _streams(options):
            result = VERBS[options.verb](options, overrides)
        _print(_shown(result, options.json), sys.stdout)
        if not options.quiet:
            step = printable(without_credentials(next_step(options, overrides, result)))
            _print(f"{_bold('next:', sys.stderr)} {step}", sys.stderr)
    except Usage as error:
        return _fail(str(error), 2)
    except UserError as error:
        return _fail(f"{program}: {error}", 2)
    except KeyboardInterrupt:
        kept = options.verb in CONTINUED or getattr(options, "search", False)
        return _fail(f"{program}: interrupted{'; start it again to continue' * kept}", 1)
    except (RunError, OSError, SafetensorError) as error:  # the last: safetensors on a full disk
        return _fail(f"{program}: {error}", 1)
    except Exception as error:
        if os.environ.get(RAISE):
            raise
        return _fail(f"{program}: {_unexpected(error, arguments)}", 1)
    return 1 if result.get("ok") is False else 0


@contextlib.contextmanager
def _streams(options: Namespace) -> Iterator[None]:
    """Everything a library prints goes to stderr: stdout carries the result alone. --quiet: to nowhere."""
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    with contextlib.ExitStack() as stack:
        if options.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(contextlib.redirect_stdout(_Printable(sys.stderr)))
        try:
            yield
        except Exception:
            if options.verbose:
                print(without_credentials(traceback.format_exc()), file=sys.stderr)
            raise


def _shown(result: dict, as_json: bool) -> str:
    if as_json:
        return json.dumps({key: value for key, value in result.items() if key not in ("screen", "coloured")})
    # `coloured` comes with colours of ours, and without anything else that a terminal obeys
    return result.get("coloured") or printable(result["screen"] if "screen" in result else _table(result))


def _print(words: str, stream: TextIO) -> None:
    """A reader that has seen enough (`| head`) is no failure. Raises RunError when the stream takes no more."""
    try:
        print(words, file=stream, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # what it still holds would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            raise RunError(f"the result could not be written: {error}") from None


def _bold(words: str, stream: TextIO) -> str:
    return f"\033[1m{words}\033[0m" if in_colour(stream) else words


def _fail(line: str, code: int) -> int:
    print(printable(without_credentials(line)), file=sys.stderr)
    return code


def _unexpected(error: Exception, arguments: list[str]) -> str:
    """The line for an error that nothing above expects; writes its trace to a file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "eagle3_xla" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}" if frames else "unknown"
    what = (str(error).strip() or "no message").splitlines()[0][:200]
    versions = f"eagle3-xla {__version__}, Python {platform.python_version()}, {platform.platform()}"
    report = "\n".join([versions, f"eagle3-xla {' '.join(arguments)}", "", traceback.format_exc()])
    with tempfile.NamedTemporaryFile("w", prefix="eagle3-xla-", suffix=".txt", delete=False) as file:
        file.write(without_credentials(report).encode(errors="backslashreplace").decode())
    return (
        f"an error that it should have explained, {type(error).__name__}: {what} (at {place}). "
        f"The trace is in {file.name}; please report it with that file"
    )


class _Printable:
    """A stream whose lines can't drive the terminal, whatever file or server they come from."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, words: str) -> int:
        return self._stream.write("\r".join(map(printable, words.split("\r"))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _overrides(rest: list[str], options: Namespace) -> list[str]:
    """`--section.key=value` arguments as load_recipe takes them. Anything else is bad usage."""
    takes_recipe = hasattr(options, "config")
    overrides = []
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not (takes_recipe and argument.startswith("--") and "." in name and equals):
            option, known = argument.partition("=")[0], option_names(options.verb)
            if option in known:  # otherwise it would not be left
                raise UserError(f"{option} comes after the verb")
            near = difflib.get_close_matches(option, known, n=1)
            form = "; settings are given as --section.key=value" if takes_recipe else ""
            raise UserError(f"unknown argument {argument}" + (f"; did you mean {near[0]}?" if near else form))
        overrides.append(f"{name}={value}")
    return overrides


def _table(result: dict) -> str:
    """Keys and values; a list of sentences has a line for each, and what there is nothing to say of has none."""
    width = max(len(key) for key in result)
    lines = []
    for key, value in result.items():
        sentences = isinstance(value, list) and any(isinstance(item, str) and " " in item for item in value)
        shown = value if sentences else [] if value is None else [value]
        lines += [f"{name:<{width}}  {_show(item)}" for name, item in zip([key, *[""] * len(shown)], shown)]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_show(item) for item in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


@contextlib.contextmanager
def _imports(torch_xla: bool = False) -> Iterator[None]:
    """Without the garbage collector: torch, torch_xla and transformers leave a million objects, and to look for garbage
    among them, now and at the end, takes 4 of 13 CPU seconds (`time eagle3-xla train --target.path=/nowhere`).

    torch_xla: whether the verb computes with it. transformers imports it wherever it is installed, by way of
    accelerate: 2 of the 8 CPU seconds that `eagle3-xla eval` takes until it says that --prompts=/nowhere isn't there.
    """
    if not torch_xla:
        os.environ["USE_TORCH_XLA"] = "0"
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _settings(kind: Any, options: Namespace, **more: Any) -> Any:
    """The dataclass `kind` from the options of the same names."""
    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(kind) if hasattr(options, f.name)}
    return kind(**named | more)


# The modules are imported by the verb that needs them: `--help` and a typing error answer at once.
def _quickstart(options: Namespace, overrides: list[str]) -> dict:
    with _imports(torch_xla=True):
        from eagle3_xla.quickstart import quickstart

    return quickstart(of_this_machine(options.out, "--out"), options.minutes)


def _prepare(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.data.prepare import prepare
        from eagle3_xla.target.families import load_target_config, refuse_longer_rows

    recipe = load_recipe(options.config, overrides)
    config = load_target_config(recipe.target.path)  # before data is read
    refuse_longer_rows(config, recipe.data.row_length, "setting data.row_length")
    manifest = prepare(recipe, options.overwrite)
    table = options.show is None and not options.json  # it has the warnings
    for warning in [] if table else manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if options.show is None:
        return manifest
    from eagle3_xla.data.show import show_rows

    return manifest | {"coloured": show_rows(recipe, options.show)}


def _regenerate(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.regenerate.conversation import Sampling
        from eagle3_xla.regenerate.run import Options, regenerate

    servers = [url for url in options.server.split(",") if url]
    settings = _settings(Options, options, servers=servers, sampling=_settings(Sampling, options))
    return regenerate(load_recipe(options.config, overrides), options.out, settings)


def _train(options: Namespace, overrides: list[str]) -> dict:
    overrides += [f"xla.device={options.device}"] if options.device else []
    try:
        recipe = load_recipe(options.config, overrides)
    except (UserError, OSError):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the other hosts wait for this one: it tells them
            from eagle3_xla.xla.hosts import join_hosts

            with join_hosts():
                raise
        raise
    with _imports(torch_xla=recipe.xla.device == "xla"):
        from eagle3_xla.train.loop import train

    return train(recipe, options.max_steps, options.allow_recompile, options.profile)


def _plan(options: Namespace, overrides: list[str]) -> dict:
    with _imports(torch_xla=True):
        from eagle3_xla.plan.search import search
        from eagle3_xla.plan.verdict import plan

    overrides += [f"plan.topology={options.topology}"] if options.topology else []
    overrides += [f"plan.xla_flags={options.xla_flags}"] if options.xla_flags else []
    return (search if options.search else plan)(load_recipe(options.config, overrides))


def _export(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.export import export

    return export(options.checkpoint, options.out, options.dtype)


def _eval(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.evaluate.options import EvalOptions
        from eagle3_xla.evaluate.run import evaluate

    settings = _settings(EvalOptions, options)
    return evaluate(options.target, options.draft, options.prompts, settings, options.report, options.run)


def _doctor(options: Namespace, overrides: list[str]) -> dict:
    from eagle3_xla.doctor.run import doctor

    return doctor(options.head, options.target, options.fix)


def _patch(options: Namespace, overrides: list[str]) -> dict:
    from eagle3_xla.serve.patch import patch

    return patch(options.action, options.engine, options.path)


def _bench(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.serve.bench import BenchOptions, bench
        from eagle3_xla.serve.client import Request

    settings = _settings(BenchOptions, options, request=_settings(Request, options))
    return bench(options.server, options.prompts, settings, options.baseline)


def _gap(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.evaluate.options import EvalOptions
        from eagle3_xla.serve.gap import gap

    return gap(options.target, options.draft, options.prompts, options.server, _settings(EvalOptions, options))


def _push(options: Namespace, overrides: list[str]) -> dict:
    with _imports():
        from eagle3_xla.serve.push import PushOptions, push

    return push(options.head, options.target, options.repo, _settings(PushOptions, options))


def _config(options: Namespace, overrides: list[str]) -> dict:
    from eagle3_xla.explain import difference, list_recipes, show

    if options.diff:
        return difference(options.diff, overrides)
    return show(options.show, overrides) if options.show else list_recipes()


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
    "config": _config,
}
