"""Four hosts of one run, started as torchrun does, each with its own disk: they end with the weights of one process."""

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.storage import files

HOSTS = 4
LOST = 75


class Story:
    """Scenarios of worker.py that one torchrun plays; `ended`, `said`: exit codes and last lines by scenario."""

    def __init__(self, folder: Path, settings: list[str]):
        self.folder, self.settings, self.scenarios = folder, settings, {}

    def disk(self, rank: int) -> Path:
        return self.folder / f"disk-{rank}"

    def run_folder(self, name: str, rank: int = 0) -> Path:
        return self.disk(rank) / name

    def add(self, name: str, *more, hosts=HOSTS, run="", change=None, signal=None) -> None:
        """A training into the folder `run` (default: one of its own) of each host's disk. change: (rank, further
        settings); signal: (rank, name, file whose appearance in host 0's folder sends it)."""
        arguments = []
        for rank in range(hosts):
            out = self.run_folder(run or name, rank)
            settings = [*self.settings, f"data.prepared={self.disk(rank) / 'data'}", f"train.out={out}", *more]
            settings += change[1] if change and change[0] == rank else []
            arguments.append(["train", *(f"--{setting}" for setting in settings)])
        if signal:
            signal = {"rank": signal[0], "name": signal[1], "when": str(self.run_folder(run or name) / signal[2])}
        self.scenarios[name] = {"hosts": hosts, "arguments": arguments, "signal": signal}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.scenarios[name] |= {"log": str(self.folder / f"{name}.log"), "port": free.getsockname()[1]}

    def play(self, forks) -> None:
        file = self.folder / "scenarios.json"
        file.write_text(json.dumps(list(self.scenarios.values())))
        done = forks.run_code(Path(__file__).with_name("worker.py").read_text(), file, HOSTS)
        assert done.returncode == 0, done.stderr
        codes = [json.loads(Path(f"{file}-{rank}").read_text()) for rank in range(HOSTS)]
        self.ended = {name: [code[i] for code in codes] for i, name in enumerate(self.scenarios)}
        self.said = {
            name: [self.lines(scenario, rank) for rank in range(scenario["hosts"])]
            for name, scenario in self.scenarios.items()
        }

    @staticmethod
    def lines(scenario: dict, rank: int) -> list[str]:
        """What `train` said of its failure."""
        text = Path(f"{scenario['log']}-{rank}").read_text()
        assert "Traceback" not in text, text
        return [line.partition("eagle3-xla train: ")[2] for line in text.splitlines() if "eagle3-xla train: " in line]

    def state(self, name: str, rank: int = 0) -> tuple[int, bytes]:
        """Micro-step and weights, moments and all of the newest checkpoint."""
        folder = self.run_folder(name, rank) / "checkpoints"
        saved = checkpoints.load_latest(folder, pytest.fail)
        return saved.micro_step, (folder / f"step-{saved.micro_step:08d}" / "state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def story(forks, small_run_in, tmp_path_factory) -> Story:
    folder = tmp_path_factory.mktemp("hosts")
    settings = [*small_run_in(folder), "train.batch_size=1", "train.epochs=4", "train.init=least_squares"]
    settings.append("loss.ttt_length=2")
    settings += [
        "train.reuse_states=true",
        "train.init_rows=32",
        "train.save_every=1",
        "train.keep=9",
        "train.tracker=tensorboard",
    ]
    prepare(load_recipe(None, settings))
    (folder / "other").mkdir()
    chats = folder / "other" / "chats.jsonl"
    chats.write_text((folder / "chats.jsonl").read_text().replace("Paris", "Lyon"))
    other = [f"data.train=[{chats}]", f"data.prepared={folder / 'other' / 'data'}"]
    prepare(load_recipe(None, [*settings, *other]))

    story = Story(folder, settings)
    for rank in range(HOSTS):
        shutil.copytree(folder / "data", story.disk(rank) / "data")
    shutil.copytree(folder / "data", folder / "alone" / "data")
    story.add("one process", f"data.prepared={folder / 'alone' / 'data'}", hosts=1)
    story.add("hosts")
    story.add("killed", signal=(2, "SIGKILL", "checkpoints/step-00000003"))
    story.add("preempted", run="killed", signal=(1, "SIGTERM", "checkpoints/step-0000000[4567]"))
    story.add("to the end", run="killed")
    story.add("another recipe", change=(2, ["train.lr=0.1"]))
    story.add("other data", change=(3, other[1:]))
    story.add("no data", change=(1, ["data.prepared=/nothing/here"]))
    story.add("no recipe", change=(2, ["train.lr=fast"]))
    (folder / "a-file").touch()
    story.add("no output", change=(0, [f"train.out={folder / 'a-file'}"]))
    story.play(forks)
    return story


def test_the_weights_are_those_of_one_process(story):
    assert story.ended["one process"] == [0, None, None, None] and story.ended["hosts"] == [0] * HOSTS
    assert story.state("one process")[0] == 8
    assert story.state("hosts") == story.state("one process")


def test_host_0_alone_writes_and_each_keeps_the_states(story):
    stored = [files(story.disk(rank) / "data" / "states").keys() for rank in range(HOSTS)]
    assert len(stored[0]) > 2 and all(of == stored[0] for of in stored)
    written = files(story.run_folder("hosts")).keys()
    assert "metrics.jsonl" in written and any(name.startswith("tensorboard/") for name in written)
    for rank in range(1, HOSTS):
        assert not story.run_folder("hosts", rank).exists() and not story.run_folder("killed", rank).exists()
    logged = [
        [{key: row.get(key) for key in ("step", "loss", "acc", "heldout_tau")} for row in map(json.loads, file.open())]
        for file in (story.run_folder(name) / "metrics.jsonl" for name in ("one process", "hosts"))
    ]
    assert logged[0] == logged[1] and len(logged[0]) > 10


def test_a_killed_host_ends_all_and_they_resume_from_the_disk_of_host_0(story):
    codes, said = story.ended["killed"], story.said["killed"]
    assert codes == [LOST, LOST, -9, LOST]
    for rank in (0, 1, 3):
        assert said[rank] == ["host 2 went away; start all hosts again to continue"]
    assert story.ended["preempted"] == [0] * HOSTS, story.said["preempted"]
    assert story.ended["to the end"] == [0] * HOSTS
    assert story.state("killed") == story.state("one process")
    for attempt in ("preempted", "to the end"):
        log = Path(story.scenarios[attempt]["log"] + "-0").read_text()
        assert "continued after step" in log
        assert ("SIGTERM: saved" in log) == (attempt == "preempted")


@pytest.mark.parametrize(
    "scenario, line",
    [
        ("another recipe", "the hosts don't have the same settings: train.lr is 0.0008 on host 0, 0.1 on host 2"),
        ("other data", "the hosts don't have the same data or target: data.prepared is "),
    ],
)
def test_what_differs_between_hosts_is_named_by_each(story, scenario, line):
    assert story.ended[scenario] == [2] * HOSTS
    for said in story.said[scenario]:
        assert len(said) == 1 and said[0].startswith(line)


@pytest.mark.parametrize(
    "scenario, failing, line",
    [
        ("no data", 1, "no prepared data at '/nothing/here'"),
        ("no recipe", 2, "train.lr"),
        ("no output", 0, "a-file is a file, or lies in one"),
    ],
)
def test_an_error_of_one_host_ends_all_with_its_line(story, scenario, failing, line):
    assert story.ended[scenario] == [2] * HOSTS
    for rank, said in enumerate(story.said[scenario]):
        assert len(said) == 1 and line in said[0]
        assert said[0].startswith(f"host {failing}: ") == (rank != failing)


def ends(forks, scene: str, folder: Path) -> tuple[list[int], list[list[str]]]:
    """(exit codes, what was said) of a scene of endings.py, by host."""
    done = forks.run_code(Path(__file__).with_name("endings.py").read_text(), scene, folder)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    logs = [(folder / str(host)).read_text() for host in range(len(codes))]
    assert not any("Traceback" in log for log in logs), logs
    return codes, [[line for line in log.splitlines() if "eagle3-xla train: " in line] for log in logs]


def test_a_host_that_only_falls_silent_ends_the_others(forks, tmp_path):
    """As when its machine vanishes: no connection is closed. One that is busy for longer is still there."""
    codes, said = ends(forks, "silent", tmp_path)
    assert codes == [LOST, LOST, -signal.SIGSTOP]
    lost = ["eagle3-xla train: host 2 went away; start all hosts again to continue"]
    assert said == [lost, lost, []]


def test_what_host_0_is_writing_is_written_when_another_fails(forks, tmp_path):
    codes, said = ends(forks, "saving", tmp_path)
    assert codes == [2, 2, 2]
    line = "eagle3-xla train: host 1: something is wrong here"
    assert said == [[line], [], [line]]
    assert checkpoints.load_latest(tmp_path / "run", pytest.fail).micro_step == 7
