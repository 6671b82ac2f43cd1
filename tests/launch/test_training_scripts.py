"""launch/: what the scripts would run, a real torchrun that is killed, and restarts over hosts."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TORCHRUN, XLA_DIST, SETUP = (LAUNCH / f"{name}.sh" for name in ("train_torchrun", "train_xla_dist", "setup_tpu_vm"))

# Stands for the Google Cloud CLI: `describe` says what the file `state` holds, `ssh` runs the command in $HOSTS/home,
# the disk, which a deleted slice takes with it.
GCLOUD = """#!/usr/bin/env bash
echo "$3 $4" >>"$HOSTS/calls"
case "$3 $4" in
  "tpu-vm describe") cat "$HOSTS/state" ;;
  "tpu-vm delete") [ "$(cat "$HOSTS/state")" = PREEMPTED ] && rm -r "$HOSTS/state" "$HOSTS/home" ;;
  "tpu-vm ssh") cd "$HOSTS/home" && for last; do :; done && HOME="$HOSTS/home" exec bash -c "${last#--command=}" ;;
  "queued-resources create") mkdir "$HOSTS/home" && echo READY >"$HOSTS/state" ;;
  *"gs://"*) cp "${3/gs:\\/\\//$HOSTS/}" "${4/gs:\\/\\//$HOSTS/}" ;;
esac
"""
# Stands for torchrun: in its first run the host is to be taken away, and it ends as told; the second comes to the end.
TORCHRUN_STUB = """#!/usr/bin/env bash
echo run >>"$HOSTS/runs"
[ "$(wc -l <"$HOSTS/runs")" = 1 ] || exit 0
touch "$HOSTS/home/preempted"
sleep 60 || echo PREEMPTED >"$HOSTS/state"
"""


def script(name: Path | str, *arguments, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    command = ["bash", name, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *(ROOT / "tests").rglob("*.sh")]
    assert len(scripts) >= 7
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_torchrun_dry():
    done = script(TORCHRUN, "--dry-run", "--config", "a recipe.yaml", "--train.lr=1e-3")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[:4] == ["torchrun", "--nnodes=1", "--nproc-per-node=1", "--standalone"]
    assert words[-4:] == ["train", "--config", "a recipe.yaml", "--train.lr=1e-3"]

    done = script(TORCHRUN, "--dry-run", "--nnodes=4", "--node-rank=2", "--rdzv=host0:29400", "--config", "r")
    words = shlex.split(done.stdout.splitlines()[-1])
    assert {"--nnodes=4", "--node-rank=2", "--rdzv-endpoint=host0:29400"} <= set(words)
    done = script(TORCHRUN, "--dry-run", "--nnodes=4", "--config", "r")
    assert done.returncode == 2 and "needs --rdzv=HOST:PORT" in done.stderr
    done = script(TORCHRUN, "--dry-run", "--nnodes=2", "--node-rank=2", "--rdzv=h:1")
    assert done.returncode == 2 and "counted from 0" in done.stderr


def test_setup_dry():
    done = script(SETUP, "--dry-run", "--data=gs://bucket/folder", "--to=~/somewhere", HOME="/home/me")
    assert done.returncode == 0, done.stderr
    assert "'.[tpu]'" in done.stdout
    assert "gcloud storage rsync --recursive gs://bucket/folder /home/me/somewhere" in done.stdout
    refused = script(SETUP, "--dry-run", "--data=bucket")
    assert refused.returncode == 2 and "gs://BUCKET/FOLDER is expected" in refused.stderr


def test_setup_outlasts_the_upgrades_of_a_new_vm(tmp_path):
    """Which hold a lock twice here; a VM without Python, and with one that ends the rest of the script."""
    tools = "basename cat cksum dirname realpath wc"
    (tmp_path / "bin").mkdir()
    for tool in tools.split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    stubs = {
        "apt-get": "exit 3",
        "sleep": "exit 0",
        "sudo": 'echo "$*" >>"$CALLS"; [ $(wc -l <"$CALLS") -gt 2 ] || { echo "Could not get lock" >&2; exit 100; }\n'
        '[[ $* != *install* ]] || /bin/cp "${0%/*}/apt-get" "${0%/*}/python3.11"',
    }
    for name, code in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    command = ["/bin/bash", tmp_path / "clone" / "launch" / "setup_tpu_vm.sh"]
    environment = {"PATH": str(tmp_path / "bin"), "CALLS": str(tmp_path / "calls")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.count("Could not get lock") == 2, done.stderr  # python3.11 -m venv
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    archive = ["add-apt-repository", "--yes", "ppa:deadsnakes/ppa"]  # Ubuntu 22.04 has a release candidate alone
    assert calls.pop(-2) == archive and [call[4] for call in calls] == ["update", "update", "update", "install"]
    assert "DPkg::Lock::Timeout" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_python_that_can_not_make_environments_is_told_of(tmp_path):
    """Ubuntu's own, without its package for that."""
    (tmp_path / "bin").mkdir()
    for tool in ("basename", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    command = ["/bin/bash", tmp_path / "clone" / "launch" / "quickstart.sh"]
    no_venv = "python3 can't make virtual environments: sudo apt-get install python3.12-venv"
    no_python = "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python3.11"
    stubs = {"[[ $* != *ensurepip* ]] && echo python3.12": no_venv, "echo python3.10; exit 1": no_python}
    for code, said in stubs.items():
        (tmp_path / "bin" / "python3").write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / "python3").chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (2, f"quickstart.sh: {said}\n")


def test_xla_dist_dry():
    arguments = ["--tpu=v", "--zone=z", "--env=A=b c", "--dir=~/a clone", "--recreate=make it"]
    arguments += ["--", "python", "-c", "print('x')"]
    done = script(XLA_DIST, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    ssh = next(words for words in lines if "ssh" in words)
    assert ssh[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "v"] and "--worker=all" in ssh
    start = shlex.split(ssh[-1].removeprefix("--command="))
    assert start[:2] == ["cd", "a clone"]
    assert start[start.index("env") + 1 :] == ["A=b c", "python", "-c", "print('x')"]
    assert done.stdout.splitlines().count("make it") == 1
    assert script(XLA_DIST, "--dry-run", "--", "true").returncode == 2


@pytest.mark.slow
def test_torchrun_continues_after_a_kill(small_run, tmp_path):
    """One process, for real: the training is killed once, started again by the script, and finishes."""
    settings = [*small_run, "train.epochs=3", "train.save_every=1"]
    prepare(load_recipe(None, settings))
    command = ["bash", TORCHRUN, "--restarts=1", *(f"--{setting}" for setting in settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints, deadline = tmp_path / "run" / "checkpoints", time.monotonic() + 600
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    found = subprocess.check_output(["pgrep", "-f", f"eagle3_xla train .*{tmp_path}"], text=True).split()
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in found}
    victim = next(pid for pid in found if not any(word.endswith((b"/torchrun", b".sh")) for word in words[pid]))
    os.kill(int(victim), signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "signal 9 ended the training; restart 1 of 1" in output and "continued after step" in output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3 * 16  # epochs of 32 chats, two in a batch


def test_torchrun_goes_on_after_another_host_was_lost(tmp_path):
    """Exit code 75 (tests/hosts/test_hosts.py: a real training's) is no explained failure: a real torchrun, a stand-in
    for the training."""
    package = tmp_path / "eagle3_xla"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import pathlib, sys\nruns = pathlib.Path(sys.argv[2])\nruns.write_text(runs.read_text() + 'run ')\n"
        "sys.exit(int(sys.argv[3]) if runs.read_text() == 'run ' else 0)\n"
    )
    runs = tmp_path / "runs"
    runs.write_text("")
    done = script(TORCHRUN, "--restarts=1", runs, 75, PYTHONPATH=str(tmp_path))
    assert (done.returncode, runs.read_text()) == (0, "run run "), done.stderr
    assert "the loss of another host ended the training; restart 1 of 1" in done.stderr


def test_torchrun_does_not_repeat_an_explained_failure(tmp_path):
    """A stand-in for torchrun, which answers 1 and says how the training ended."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    torchrun = tmp_path / ".venv" / "bin" / "torchrun"
    torchrun.parent.mkdir(parents=True)
    said = "failed (exitcode: 2) local_rank: 0 (pid: 7) of binary: python"
    torchrun.write_text(f'#!/usr/bin/env bash\necho run >>"$RUNS"\necho "{said}" >&2\nexit 1\n')
    torchrun.chmod(0o755)
    done = script(tmp_path / "launch" / "train_torchrun.sh", "--restarts=1", RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2 and "the training failed (exit code 2): see above" in done.stderr, done.stderr
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.fixture
def hosts(tmp_path):
    """(folder of the pretended host, environment with the gcloud above)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "hosts" / "home" / "eagle3-xla").mkdir(parents=True)
    (tmp_path / "hosts" / "state").write_text("READY\n")
    folder = tmp_path / "hosts"
    return folder, {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOSTS": str(folder)}


@pytest.fixture
def metadata_server(hosts):
    """Address of a stand-in for Google's: a slice of one host, preempted once it has a file of this name."""
    attributes = {"agent-worker-number": "0", "worker-network-endpoints": "host:1:127.0.0.1"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            waits = time.monotonic() + 60 if "wait_for_change" in self.path else 0
            while not (preempted := (hosts[0] / "home" / "preempted").exists()) and time.monotonic() < waits:
                time.sleep(0.02)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes.get(self.path.split("/")[-1], str(preempted).upper()).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# Killed, or told to stop by the host that shuts down; DELETING is one that can't be deleted again.
@pytest.mark.parametrize("end, state", [("kill -9 $$", "PREEMPTED"), ("exit 0", "PREEMPTED"), ("exit 0", "DELETING")])
def test_xla_dist_goes_on_after_a_preemption(hosts, end, state):
    folder, environment = hosts
    # The first run ends and the slice is gone; --recreate brings it back; --setup and COMMAND need a second try.
    command = f'echo run >>$HOSTS/runs; [ "$(wc -l <$HOSTS/runs)" -gt 1 ] || {{ echo {state} >$HOSTS/state; {end}; }}'
    recreate = "rm -rf $HOSTS/home && mkdir $HOSTS/home && echo READY >$HOSTS/state"
    setup = "mkdir eagle3-xla || exit 1; [ -e tried ] || { rmdir eagle3-xla; touch tried; exit 1; }; touch ready"
    arguments = ["--tpu=v", "--poll=0", f"--recreate={recreate}", f"--setup={setup}", "--", "bash", "-c", command]
    done = script(XLA_DIST, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs").read_text() == "run\nrun\n" and (folder / "home" / "ready").exists()
    assert f"v is {state}; restart 1 of 10" in done.stderr
    assert (folder / "calls").read_text().splitlines().count("tpu-vm delete") == 1


def test_xla_dist_believes_a_run_that_ended_well_where_the_slice_can_not_be_described(hosts):
    folder, environment = hosts
    command = "echo run >>$HOSTS/runs; rm $HOSTS/state"
    arguments = ["--tpu=v", "--poll=0", "--recreate=touch $HOSTS/made", "--", "bash", "-c", command]
    done = script(XLA_DIST, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert "the command ended well; gcloud can't describe v" in done.stderr
    assert (folder / "runs").read_text() == "run\n" and not (folder / "made").exists()


def test_the_guides_commands_go_on_after_a_preemption_notice(hosts, metadata_server, tmp_path):
    """Steps 4 and 5 of docs/tpu.md as they stand. It ends well, on a slice that will be gone with its disk."""
    folder, environment = hosts
    steps = re.split(r"^## \d", (ROOT / "docs" / "tpu.md").read_text(), flags=re.MULTILINE)[1:]
    bash = [re.findall(r"^```bash\n(.*?)^```", step, re.DOTALL | re.MULTILINE) for step in steps]
    software, (_, make_slice, train, _) = bash[4][1], bash[5]
    clone = tmp_path / "eagle3-xla"
    shutil.copytree(LAUNCH, clone / "launch")
    (clone / "launch" / "torchrun").write_text(TORCHRUN_STUB)
    (clone / "launch" / "torchrun").chmod(0o755)
    set_up = 'cd "${BASH_SOURCE%/*}/.." && mkdir -p .venv/bin && cp launch/torchrun .venv/bin\n'
    (clone / "launch" / "setup_tpu_vm.sh").write_text(set_up)
    (clone / "make-slice.sh").write_text(make_slice)
    (folder / "MY-BUCKET").mkdir()

    archive, _, software = software.partition("\n")
    assert archive == "git archive --prefix=eagle3-xla/ --output=eagle3-xla.tar.gz HEAD"
    subprocess.run(["tar", "czf", clone / "eagle3-xla.tar.gz", "eagle3-xla/launch"], cwd=tmp_path, check=True)
    commands = f"set -e\n{software}{train.replace('--tpu', '--poll=0 --tpu', 1)}"
    done = script("-c", commands, cwd=clone, **environment, GCE_METADATA_HOST=metadata_server)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs").read_text() == "run\nrun\n"
    assert "train_torchrun.sh: preempted; the training ended in time" in done.stderr
    assert "exit code 75, my-v4-32 is PREEMPTED; restart 1 of 10" in done.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert calls.count("tpu-vm delete") == calls.count("queued-resources create") == 1


def test_xla_dist_can_be_stopped_while_it_waits(hosts):
    folder, environment = hosts
    command = ["bash", XLA_DIST, "--tpu=v", "--poll=1", "--", "bash", "-c", "echo PREEMPTED >$HOSTS/state; kill -9 $$"]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    said = ""
    while "restart 1 of 10" not in said:
        said = process.stderr.readline()
        assert said, "it ended by itself"
    time.sleep(0.2)  # it looks again and waits
    process.terminate()
    try:
        _, said = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 1 and "stopped before the command ran again" in said


def test_xla_dist_does_not_repeat_an_explained_failure(hosts):
    folder, environment = hosts
    command = ["bash", "-c", "echo run >>$HOSTS/runs; exit 2"]
    done = script(XLA_DIST, "--tpu=v", "--poll=0", "--", *command, **environment)
    assert done.returncode == 2 and "the command failed on a host (exit code 2)" in done.stderr
    assert (folder / "runs").read_text() == "run\n"


def test_the_lock_file_is_that_of_setup_cfg():
    done = subprocess.run([sys.executable, LAUNCH / "lock.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run .venv/bin/python launch/lock.py: {done.stdout}"


def test_a_fresh_environment_gets_what_is_locked_and_no_more(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    uv = [sys.executable, "-m", "uv", "pip"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    # What this environment has too lies in the user's cache; copies of it would be 10 GB.
    users = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    command = [*uv, "install", "--link-mode", "symlink", "--python", python, "--requirement"]
    done = subprocess.run([*command, LAUNCH / "requirements.lock"], env=users, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = [line for line in (LAUNCH / "requirements.lock").read_text().splitlines() if "==" in line]
    assert sorted(line[3:] for line in done.stderr.splitlines() if line.startswith(" + ")) == sorted(wanted)
    subprocess.run([*uv, "check", "--python", python], check=True)  # nothing that these packages need is missing
    command = [python, "-m", "eagle3_xla", "config", "--show", "smollm2-cpu"]
    done = subprocess.run(command, env={"PYTHONPATH": str(LAUNCH.parent / "src")}, capture_output=True, text=True)
    assert done.returncode == 0 and "draft_vocab_size: 8192" in done.stdout, done.stderr
