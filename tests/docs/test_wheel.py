"""The wheel holds all that the commands need, and nothing heavy is asked for."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, check=True).stdout.decode()
    return [name for name in listed.split("\0") if name and (TOP / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((TOP / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, folder / "source"]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_it_has_every_module_template_and_default(wheel: zipfile.ZipFile) -> None:
    wanted = {name for name in tracked() if name.startswith("tfslurm/") and name.endswith(".py")}
    wanted |= {f"tfslurm/{name}" for name in tracked() if name.startswith("configs/")}
    wanted |= {f"tfslurm/{name}" for name in tracked() if name.startswith("sbatch_templates/")}
    assert wanted - set(wheel.namelist()) == set()


def test_its_core_asks_for_no_torch(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    header = HeaderParser().parsestr(wheel.read(metadata).decode())
    core = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in core if line.startswith(("torch", "transformers", "vllm", "numpy", "h5py"))]
    assert {"train", "serve", "serve-cpu", "postgres", "s3", "test"} <= set(header.get_all("Provides-Extra"))
    assert header["License-Expression"] == "Apache-2.0" or "Apache-2.0" in (header["License"] or "")


def test_installed_it_renders_and_reads_what_it_ships(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = (
        "import tfslurm, tfslurm.configs; from tfslurm import settings;"
        "from tfslurm.slurm.templates import _environment;"
        "print(tfslurm.__file__, tfslurm.configs.__file__);"
        "print(list(settings.load(environ={}).instances)); print(_environment().list_templates())"
    )
    # -P keeps the checkout, which is the working folder, off the path.
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path)) == 2
    assert "train.sh.j2" in done.stdout
