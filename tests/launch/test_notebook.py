"""launch/notebook.ipynb, every cell of it, on the CPU: a small target, settings by the environment."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.train.loop import train

NOTEBOOK = Path(__file__).parents[2] / "launch" / "notebook.ipynb"
# The small target on eight modelled chips; a plan needs no device.
PLAN = "--topology=v5e-8 --xla.device=xla --xla.dp=8 --train.batch_size=1 --loss.ttt_length=1"


def sources(*ids: str) -> str:
    """The code of the cells of these ids, of all without one."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "code" and (not ids or c.id in ids))


def run_all_cells() -> str:
    """What they print, with their tracebacks."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_all_cells_again_use_the_same_device(monkeypatch):
    devices = []

    class Recorded:
        stdout = ()

        def __init__(self, command, env=os.environ, **_):
            devices.append((command[3], env.get("PJRT_DEVICE")))

        def wait(self):
            return 0

    monkeypatch.delenv("PJRT_DEVICE")
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    namespace = {}
    for _ in range(2):
        exec(sources(), namespace)
    first, second = devices[: len(devices) // 2], devices[len(devices) // 2 :]
    assert first == second and ("train", "TPU") in first and ("eval", "CPU") in first


# A verb that saves for half a second after a signal, and like training not after a second Ctrl-C.
SAVING = """
import signal, sys, time
stopping = []
def note(number, frame):
    stopping.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
print("training", flush=True)
while not stopping:
    time.sleep(0.01)
time.sleep(0.5)
print("saved", flush=True)
open("saved", "w").close()
"""
INTERRUPTED = """
try:
    eagle3("train")
except KeyboardInterrupt:
    print("the cell ended", os.path.exists("saved"))
"""


@pytest.mark.parametrize("interrupt", [os.kill, os.killpg], ids=["the kernel", "its group, as Jupyter does"])
def test_an_interrupted_cell_ends_when_its_verb_has_saved(interrupt, tmp_path):
    (tmp_path / "eagle3_xla").mkdir()
    (tmp_path / "eagle3_xla" / "__init__.py").touch()
    (tmp_path / "eagle3_xla" / "__main__.py").write_text(SAVING)
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # not so in the background
    command = [sys.executable, "-u", "-c", listening + sources("c2", "c4") + INTERRUPTED]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as kernel:
        assert [kernel.stdout.readline() for _ in range(2)] == ["$ eagle3-xla train\n", "training\n"]
        interrupt(kernel.pid, signal.SIGINT)
        assert kernel.stdout.read() == "saved\nthe cell ended True\n"


@pytest.mark.slow
def test_every_cell_after_a_lost_runtime(small_target, small_run, chat_file, tmp_path, monkeypatch):
    recipe = {}
    for setting in small_run:
        name, _, value = setting.partition("=")
        section, key = name.split(".")
        recipe.setdefault(section, {})[key] = yaml.safe_load(value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    work = tmp_path / "work"
    environment = {
        "EAGLE3_RECIPE": str(tmp_path / "recipe.yaml"),
        "EAGLE3_WORK": str(work),
        "EAGLE3_TARGET": str(small_target),
        "EAGLE3_HELDOUT": str(chat_file),
        "EAGLE3_MORE": "train.save_every=4",
        "EAGLE3_PLAN": PLAN,
        "EAGLE3_TRAIN": "--max-steps=8",
        "EAGLE3_EVAL": "--limit 1 --max-new-tokens 8",
        "PJRT_DEVICE": "CPU",
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOK.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # What the lost runtime left: the cells' run, with a checkpoint.
    places = [f"target.path={small_target}", f"data.prepared={work / 'data'}", f"train.out={work / 'run'}"]
    earlier = load_recipe(str(tmp_path / "recipe.yaml"), [*places, "train.save_every=4"])
    prepare(earlier)
    train(earlier, max_steps=4)
    printed = run_all_cells()
    assert re.search(r"^ended +max_steps$", printed, re.MULTILINE), printed[-6000:]
    for part in ("fits v5e-8: 8 chips, dp=8 x tp=1", "continued after step 4\n", "\ntau "):
        assert part in printed, printed[-6000:]
    assert (work / "head" / "model.safetensors").is_file()
