"""What every test shares: XLA on the CPU, the embedded target, a small real Qwen2."""

import fcntl
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

# The environments are installed without bytecode (launch/install.sh): what starts first writes it for the rest.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["EAGLE3_XLA_RAISE"] = "1"  # what no line explains ends in its traceback
# Small tensors gain nothing from a second thread, and threads that wait for each other by spinning cost the other
# test process its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling for the CPU takes a quarter of the time without LLVM's expensive passes, and half of that without the
# fusions' own code generator; results stay within rounding.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """What tests import, once and first. The process that starts xdist's others runs none, and needs nothing."""
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    gc.disable()  # until all is imported, none of it garbage: looking through it takes seconds, again and again
    names = ["torch_xla"]
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # it will need them, whatever tests it gets
        names += ["transformers.models.auto.modeling_auto", "gcsfs", "pandas", "matplotlib.image", "sympy", "networkx"]
        if worker == "gw1":
            names.reverse()  # on a fresh installation two processes share the compiling that both did otherwise
    for name in names:
        importlib.import_module(name)
    sys.modules["torch_xla"].device()  # before the first backward: autograd sizes its queues then
    gc.freeze()
    gc.enable()


SMALL_VOCABULARY = 4096
LONG_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CHATS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three colours.", "Red, green and blue are three colours."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("Say hello.", "Hello! How can I help you today?"),
]


@pytest.fixture(autouse=True)
def torch_xla_is_seen(monkeypatch):
    """Verbs that are called in this process leave torch_xla out (cli.py) for themselves alone."""
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # transformers' own default


@pytest.fixture(scope="session")
def embedded_target(tmp_path_factory) -> Path:
    """The embedded target's folder, made once for all processes of a session."""
    from eagle3_xla.target.embedded import write_embedded_target

    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded-target"
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_embedded_target(out)  # or finds it whole
    return out


@pytest.fixture(scope="session")
def tokenizer_folder(embedded_target, tmp_path_factory) -> Path:
    """The embedded target's tokenizer, its first SMALL_VOCABULARY tokens alone: merges stand in the order of their ids,
    so the rest is a tokenizer as it is. Logits over all 49,152 would be most of what small models compute. With a
    shorter default system prompt, which would take half of a row.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(embedded_target / "tokenizer_config.json", folder)
    template = (embedded_target / "chat_template.jinja").read_text()
    assert template.count(LONG_PROMPT) == 1
    (folder / "chat_template.jinja").write_text(template.replace(LONG_PROMPT, "You are a helpful assistant"))
    whole = json.loads((embedded_target / "tokenizer.json").read_text())
    model = whole["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < SMALL_VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from eagle3_xla.data.tokenizer import load_tokenizer

    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(scope="session")
def small_target(tokenizer, tmp_path_factory) -> Path:
    """A real Qwen2 of 8 layers with random weights and the small tokenizer: seconds instead of minutes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.2,  # with the usual 0.02 its next-token distribution would be flat
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("small-target")
    model = Qwen2ForCausalLM(config)
    spoken = torch.tensor(sorted({token for chat in CHATS for text in chat for token in tokenizer(text)["input_ids"]}))
    silent = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, spoken, False)
    model.model.embed_tokens.weight.data[silent] *= 0.01  # it says words of CHATS, so a small draft vocabulary serves
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def exported_head(small_target, tmp_path_factory) -> Path:
    """A head with the small target's sizes, 128 draft tokens and random weights, exported from a checkpoint."""
    import torch

    from eagle3_xla import checkpoint
    from eagle3_xla.data.tokenizer import load_config
    from eagle3_xla.data.vocab import d2t_t2d
    from eagle3_xla.draft.model import Eagle3Head, draft_config
    from eagle3_xla.export import export

    folder = tmp_path_factory.mktemp("exported")
    config = load_config(str(small_target))
    torch.manual_seed(0)
    head = Eagle3Head(draft_config(config, 128))
    ids = torch.arange(128) * 3
    ids[0], ids[-1] = 2, config.vocab_size - 1  # <|im_end|> ends the target's answers
    d2t, t2d = d2t_t2d(ids.sort().values, config.vocab_size)
    saved = checkpoint.Checkpoint(
        micro_step=1,
        head={name: value.detach() for name, value in head.state_dict().items()},
        optimizer={"step": torch.ones(())},
        d2t=d2t,
        t2d=t2d,
        recipe={},
        data_key="",
        draft_config=head.config.to_dict(),
    )
    export(checkpoint.save(folder / "checkpoints", saved, keep=1), folder / "head", "float32")
    return folder / "head"


def write_chats(folder: Path) -> Path:
    """32 short chats in ShareGPT form."""
    file = folder / "chats.jsonl"
    with file.open("w") as handle:
        for i in range(32):
            question, answer = CHATS[i % len(CHATS)]
            turns = [{"from": "human", "value": f"{question} ({i})"}, {"from": "gpt", "value": answer}]
            handle.write(json.dumps({"conversations": turns}) + "\n")
    return file


def small_settings(small_target, chat_file, tmp_path) -> list[str]:
    """Settings of a run that trains on the small target in seconds."""
    return [
        f"target.path={small_target}",
        "target.dtype=float32",
        f"data.train=[{chat_file}]",
        f"data.heldout=[{chat_file}]",
        "data.deduplicate=none",
        f"data.prepared={tmp_path / 'data'}",
        "data.row_length=64",
        "data.draft_vocab_size=128",
        "loss.ttt_length=3",
        "xla.device=cpu",
        "xla.autocast=false",
        f"train.out={tmp_path / 'run'}",
        "train.epochs=2",
        "train.batch_size=2",
        "train.init_rows=8",
        "train.heldout_rows=4",
        "train.log_every=1",
        "train.tracker=none",
    ]


@pytest.fixture(scope="session")
def gcs(tmp_path_factory):
    """An emulated bucket (tests/gcs.py), and a cache folder for what is read from it."""
    from gcs import Bucket

    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    bucket = Bucket()
    yield bucket
    bucket.close()
    del os.environ["XDG_CACHE_HOME"]


@pytest.fixture
def chat_file(tmp_path) -> Path:
    return write_chats(tmp_path)


@pytest.fixture
def small_run(small_target, chat_file, tmp_path) -> list[str]:
    return small_settings(small_target, chat_file, tmp_path)


@pytest.fixture(scope="session")
def small_run_in(small_target):
    """small_run for fixtures that outlive a test: folder -> settings."""
    return lambda folder: small_settings(small_target, write_chats(folder), folder)


@pytest.fixture(scope="session")
def trained(small_run_in, tmp_path_factory) -> Path:
    """The exported folder of a small head whose drafts its random target accepts now and then, beside its `run`."""
    from eagle3_xla.config import load_recipe
    from eagle3_xla.data.prepare import prepare
    from eagle3_xla.export import export
    from eagle3_xla.train.loop import train

    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(None, [*small_run_in(folder), "train.epochs=12", "train.lr=3e-3", "data.draft_vocab_size=256"])
    prepare(recipe)
    train(recipe)
    export(folder / "run", folder / "head", "float32")
    return folder / "head"


def run_cli(
    *arguments, environment: dict | None = None, timeout: float = 600, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """`python -m eagle3_xla ...` as a user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "eagle3_xla", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (environment or {}),
        cwd=cwd,
    )


@pytest.fixture
def cli():
    return run_cli


@pytest.fixture(scope="session")
def forks():
    """run(...) as `cli`, without waiting for imports (tests/forks.py)."""
    from forks import Forks

    started = Forks()
    yield started
    started.close()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """What shares the quickstart's run or its wheel, and the engines with their large servers, go to one process of
    several, the quickstart first: while that trains, the engines' environments are installed (launch/test.sh). What
    shares another costly fixture goes to one process too. pytest-xdist deals out the groups with the most tests first,
    then single tests as they stand here: slow ones first, so that no process ends long after the others."""

    def place(item) -> int:
        if "engines" in item.path.parts:
            return 1
        return 0 if "installed_wheel" in item.fixturenames else 2 if item.get_closest_marker("slow") else 3

    items.sort(key=place)
    for item in items:
        if place(item) < 2:
            item.add_marker(pytest.mark.xdist_group("quickstart"))
            continue
        for fixture in {"trained", "story", "template_targets", "wheels"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(fixture))


def pytest_addoption(parser):
    parser.addoption("--quickstart", type=Path, help="a finished quickstart folder for the engine tests")


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory) -> Path:
    """A folder that the package's wheel was installed to, as `pip install dist/*.whl` does; for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wheel")
    uv = [sys.executable, "-m", "uv"]
    copy = folder / "source"  # a build leaves its folder behind, and takes what an earlier one left
    ignored = shutil.ignore_patterns(".*", "build", "quickstart", "*.egg-info", "__pycache__", "site", "tests")
    shutil.copytree(Path(__file__).parents[1], copy, ignore=ignored)
    subprocess.run([*uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", copy], check=True)
    (wheel,) = (folder / "dist").glob("eagle3_xla-*.whl")
    into = ["--python", sys.executable, "--target", folder / "site"]
    subprocess.run([*uv, "pip", "install", "--quiet", "--no-deps", *into, wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="session")
def quickstart_run(installed_wheel, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The quickstart from an installed wheel and an empty folder, with the least training, broken off by a Ctrl-C once
    its data is there and started again: (the second process, folder)."""
    folder = tmp_path_factory.mktemp("quickstart")
    # A target of a real size: its steps gain more from optimised code than compiling that costs.
    flags = os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1")
    environment = {"PYTHONPATH": str(installed_wheel), "XLA_FLAGS": flags}
    arguments = ["quickstart", "--minutes", "0.1"]
    with open(folder / "first.log", "w") as log:
        command, own = [sys.executable, "-m", "eagle3_xla", *arguments], os.environ | environment
        # A shell's background job ignores the signal, and so would this one.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        first = subprocess.Popen(command, stderr=log, stdout=log, env=own, cwd=folder, preexec_fn=heard)
    manifest, deadline = folder / "quickstart" / "data" / "manifest.json", time.monotonic() + 600
    while not manifest.is_file() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said = f"{first.wait(300)} {(folder / 'first.log').read_text()}"
    assert said.startswith("1 ") and "interrupted; start it again to continue" in said, said
    done = run_cli(*arguments, environment=environment, timeout=900, cwd=folder)
    return done, folder / "quickstart"
