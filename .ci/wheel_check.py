"""Tries the wheel and the sdist of ``dist/`` as somebody would who has nothing of the repository.

The wheel is installed into an environment of its own, elsewhere. What it depends on is linked from the environment that
runs this, and nothing else is: neither the packages of the extras nor the editable installation of the repository. A
second copy of torch would be gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN = """
import sys
from importlib import metadata
from pathlib import Path

import snntorch as snn
import torch
from torch import nn

import snntorch_lr as slr
import snntorch_lr.robustness

assert Path(slr.__file__).is_relative_to(sys.prefix), slr.__file__
assert Path(slr.__file__).with_name("py.typed").exists()
assert metadata.version("snntorch-lr") == slr.__version__

first, second = (snn.Leaky(beta=0.9, init_hidden=True) for _ in range(2))
net = nn.Sequential(nn.Linear(4, 8), first, nn.Linear(8, 3), second)
slr.add_noise(net)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
slr.attach(optimizer, net)
before = net[0].weight.detach().clone()
loss = nn.functional.cross_entropy(slr.rollout(net, torch.rand(6, 4), num_steps=5).sum(0), torch.arange(6) % 3)
loss.backward()
optimizer.step()
assert loss.isfinite() and not torch.equal(net[0].weight, before)
print(f"snntorch_lr {slr.__version__} trained a step")
"""


def main() -> None:
    """Checks the one sdist and the one wheel there are."""
    (sdist,) = (REPOSITORY / "dist").glob("*.tar.gz")
    (wheel,) = (REPOSITORY / "dist").glob("*.whl")
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        check_wheel(wheel, Path(folder))


def check_sdist(sdist: Path) -> None:
    """Everything that is tracked is there, but for what is about the repository only (names that begin with a dot)."""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    missing = [name for name in listed.splitlines() if not name.startswith(".") and name not in packed]
    assert not missing, f"the sdist lacks {', '.join(missing)}"


def check_wheel(wheel: Path, folder: Path) -> None:
    """Installs it without an index, trains a step, and asks for the command, whose extra is not there."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for distribution in dependencies(requirements(wheel)):
        link(distribution, site)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(folder, *pip, "install", "--quiet", "--no-index", wheel)
    run(folder, *pip, "check")
    print(run(folder, python, "-c", TRAIN).stdout, end="")
    said = run(folder, python.with_name("snntorch-lr"), "--version", fails=True).stderr
    assert said.count("\n") == 1, said
    assert "pip install 'snntorch-lr[experiments,attacks]'" in said, said
    print(f"without the extra: {said}", end="")


def requirements(wheel: Path) -> list[str]:
    """What a wheel says it needs."""
    folder = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    with zipfile.ZipFile(wheel) as archive:
        return metadata.PathDistribution(zipfile.Path(archive, f"{folder}/")).requires or []


def dependencies(required: Iterable[str]) -> Iterator[metadata.Distribution]:
    """The installed distributions that are required, and what those require, each once."""
    waiting, seen = [(each, "") for each in required], set()
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        distribution = metadata.distribution(requirement.name)
        for asked in ("", *requirement.extras):
            if (requirement.name, asked) not in seen:
                seen.add((requirement.name, asked))
                waiting += [(each, asked) for each in distribution.requires or []]
                yield distribution


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Links the files of a distribution into another environment."""
    for name in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / name).is_symlink():
            (site / name).symlink_to(Path(str(distribution.locate_file(name))).resolve())


def run(folder: Path, *command: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder, away from the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert (result.returncode != 0) == fails, f"{command[0]}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


if __name__ == "__main__":
    main()
