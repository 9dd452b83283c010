"""Every command, when something around it is wrong: one line, a status, and what was there is still there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torchvision import datasets

from snntorch_lr._files import save
from snntorch_lr.experiments import benchmark, cli, data, files, measure, study

from .commands import Result, is_one_line, quick_gates, run
from .test_data import write_idx

PATIENCE = 120  # seconds, on a busy machine
STEPS = ["--repeats", "1", "--num-steps", "1", "--width", "2", "--batch", "2"]
COMMANDS = {
    "reproduce": ["--epochs", "1", "--copies", "2", "--attack-images", "4", "--draws", "1", "--epsilon", "0.1"],
    "evaluate": ["NET", "--suite", "quick", "--images", "4", "--draws", "1", "--votes", "1", "--epsilon", "0.1"],
    "benchmark": ["--part", "steps", "--dataset", "digits", *STEPS],
    "study": ["digits"],
}
# Where each of them works longest.
WORK = {
    "reproduce": (measure, "train"),
    "evaluate": (measure, "evaluate"),
    "benchmark": (benchmark, "median_milliseconds"),
    "study": (study, "ProcessPoolExecutor"),
}
# What is left after Ctrl-C.
LEFT = {
    "reproduce": "the same command with --resume goes on",
    "evaluate": "the same command goes on",
    "benchmark": "nothing was written",
    "study": "finished networks, epochs and attacks are kept: start again",
}
every_command = pytest.mark.parametrize("command", COMMANDS)
# A study writes from processes of its own.
in_this_process = pytest.mark.parametrize("command", [command for command in COMMANDS if command != "study"])


@pytest.fixture(scope="module")
def net(checkpoints: Path) -> Path:
    return checkpoints / "lr.pt"


@pytest.fixture(autouse=True)
def digits_are_few_and_gates_quick(few: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load = data.load
    monkeypatch.setattr(data, "load", lambda name, root=None: few if name == "digits" else load(name, root))
    with quick_gates():
        yield


@pytest.fixture
def call(net: Path) -> Callable[..., Result]:
    def call(command: str, out: Path, *more: str) -> Result:
        return run(
            command, *(str(net) if word == "NET" else word for word in COMMANDS[command]), *more, "--out", str(out)
        )

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@every_command
def test_out_below_a_file_is_told_before_the_work(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*WORK[command], raising(AssertionError("worked")))
    (tmp_path / "file").write_text("kept")
    is_one_line(call(command, tmp_path / "file" / "out"), 1, str(tmp_path / "file" / "out"), "Not a directory")
    assert contents(tmp_path) == {"file": b"kept"}


@every_command
def test_out_that_cannot_be_written_is_told_before_the_work(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*WORK[command], raising(AssertionError("worked")))
    monkeypatch.setattr(os, "write", raising(OSError(errno.ENOSPC, "No space left on device")))
    is_one_line(call(command, tmp_path / "out"), 1, str(tmp_path / "out"), "No space left on device")
    assert list(tmp_path.iterdir()) == []


@in_this_process
def test_a_disk_that_is_full_at_the_end_costs_nothing_that_was_there(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ["results.json", "robustness.md", "robustness.json", "benchmark.json", "epsilon.png"]
    for name in results:
        (tmp_path / name).write_text("earlier")
    replace_file = os.replace

    def refuse(source: Any, target: Any) -> None:
        if tmp_path in Path(target).parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    is_one_line(call(command, tmp_path), 1, str(tmp_path), "No space left on device")
    assert contents(tmp_path) == dict.fromkeys(results, b"earlier")


@in_this_process
def test_without_a_network_missing_data_are_told_with_the_remedy(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.MNIST, "download", raising(RuntimeError("Error downloading train.gz:\nTried a\n")))
    more = ["--part", "accuracy"] if command == "benchmark" else []
    result = call(command, tmp_path / "out", "--dataset", "mnist", "--data-root", str(tmp_path / "data"), *more)
    is_one_line(result, 1, "mnist is not under", "Error downloading train.gz", "--data-root")
    assert contents(tmp_path) == {}


@every_command
def test_a_folder_in_use_is_refused(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*WORK[command], raising(AssertionError("worked")))
    with files.locked(tmp_path):
        is_one_line(call(command, tmp_path), 2, f"{tmp_path} is in use by another process")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("command", "folder"),
    [("reproduce", "digits-mlp-seed3"), ("evaluate", "robustness/digits-mlp-seed3")],
)
def test_without_out_the_folder_says_which_run_it_is(command: str, folder: str, net: Path) -> None:
    words = [str(net) if word == "NET" else word for word in COMMANDS[command]]
    assert cli.COMMANDS[command].parse([*words, "--seed", "3"]).folder == Path("runs", folder)


@every_command
def test_ctrl_c_is_one_line(
    command: str, call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("earlier")
    monkeypatch.setattr(*WORK[command], raising(KeyboardInterrupt()))
    is_one_line(call(command, tmp_path), 130, "interrupted; ", LEFT[command])
    assert contents(tmp_path) == {"results.json": b"earlier"}


def broken(kind: str, net: Path) -> bytes:
    whole = torch.load(net, weights_only=True)
    if kind == "cut":
        return net.read_bytes()[: net.stat().st_size // 2]
    changes: dict[str, Any] = {
        "tensor": torch.zeros(3),
        "other weights": whole | {"net": {"a": torch.zeros(3)}},
        "no recipe": {key: value for key, value in whole.items() if key != "recipe"},
        "unknown model": whole | {"recipe": whole["recipe"] | {"model": "rnn"}},
    }
    if kind == "flipped":
        content = bytearray(net.read_bytes())
        content[content.index(whole["net"]["readout.bias"].numpy().tobytes())] ^= 1
        return bytes(content)
    with tempfile.TemporaryFile() as file:
        torch.save(changes[kind], file)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("kind", ["cut", "flipped", "tensor", "other weights", "no recipe", "unknown model"])
@pytest.mark.parametrize("command", ["reproduce", "evaluate"])
def test_a_corrupt_checkpoint_is_named_and_kept(
    command: str, kind: str, net: Path, call: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "likelihood-ratio.pt"
    path.write_bytes(broken(kind, net))
    before = contents(tmp_path)
    more = {"reproduce": "--resume", "evaluate": str(path)}
    is_one_line(call(command, tmp_path, more[command]), 2, "likelihood-ratio.pt")
    assert contents(tmp_path) == before


def test_a_checkpoint_of_a_training_that_diverged_is_refused(
    net: Path, call: Callable[..., Result], tmp_path: Path
) -> None:
    state, path = torch.load(net, weights_only=True), tmp_path / "diverged.pt"
    state["net"]["blocks.0.1.weight"].fill_(float("nan"))
    save(path, state)
    is_one_line(call("evaluate", tmp_path / "out", str(path)), 2, "diverged: NaN or", "in blocks.0.1.weight; ")
    assert not (tmp_path / "out").exists()


def test_networks_of_other_images_are_refused(call: Callable[..., Result], tmp_path: Path) -> None:
    write_idx(tmp_path / "data" / "MNIST" / "raw")
    result = call("evaluate", tmp_path / "out", "--dataset", "mnist", "--data-root", str(tmp_path / "data"))
    is_one_line(result, 2, "lr was trained on digits, and cannot take the images of mnist")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["meta", "cuda:99", "tpu"])
@every_command
def test_a_device_that_is_not_there_is_refused(
    command: str, device: str, call: Callable[..., Result], tmp_path: Path
) -> None:
    is_one_line(call(command, tmp_path / "out", "--device", device), 2, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_result_of_a_study_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    is_one_line(run("report", str(tmp_path)), 2, "a.json is not a result of a study")
    assert contents(tmp_path) == {"a.json": b"{"}


PROCESSES = {
    "benchmark": ["--part", "memory", "--width", "2", "--batch", "2", "--threads", "1"],
    "study": ["digits", "--jobs", "2"],
}


def started(command: str, out: Path) -> subprocess.Popen[str]:
    """A command that starts processes of its own, as one in the foreground of a terminal, with these at work."""
    process = subprocess.Popen(
        [sys.executable, "-m", "snntorch_lr.experiments.cli", command, *PROCESSES[command], "--out", str(out)],
        env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A test run that was started in the background of a shell ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    patience = time.monotonic() + PATIENCE
    while not workers(process):
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.05)
    return process


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Its children that train or measure; others, short-lived ones, are started by imports."""

    def works(child: psutil.Process) -> bool:
        try:
            words = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            return False
        return "spawn_main" in words or "experiments.benchmark" in words

    return [child for child in psutil.Process(process.pid).children() if works(child)]


@pytest.mark.parametrize("command", PROCESSES)
def test_ctrl_c_ends_the_processes_of_a_command_too(command: str, tmp_path: Path) -> None:
    process = started(command, tmp_path / "out")
    try:
        left = workers(process)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    kept = {"benchmark": "nothing was written", "study": "finished networks, epochs and attacks are kept: start again"}
    assert said == f"snntorch-lr: interrupted; {kept[command]}\n"
    assert not psutil.wait_procs(left, timeout=PATIENCE)[1]
    # They were ended, and not waited for.
    assert not list((tmp_path / "out").rglob("*.json"))


def test_processes_of_a_study_end_when_it_is_killed(tmp_path: Path) -> None:
    process = started("study", tmp_path / "out")
    left = workers(process)
    process.kill()
    alive = psutil.wait_procs(left, timeout=PATIENCE)[1]
    for worker in alive:
        worker.kill()
    process.communicate()
    assert not alive


def test_a_process_of_a_study_that_is_killed_is_one_line(tmp_path: Path) -> None:
    process = started("study", tmp_path / "out")
    try:
        patience = time.monotonic() + PATIENCE
        # Killed at work, as want of memory does it, and not while they are started.
        while not list((tmp_path / "out").rglob("*.pt")):
            assert time.monotonic() < patience
            time.sleep(0.05)
        for worker in workers(process):
            worker.kill()
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.startswith("snntorch-lr: a process was killed")
    assert said.count("\n") == 1
