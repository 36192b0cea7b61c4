"""The batch scripts. To renew a golden file, delete it and run the tests."""

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tfslurm import __version__
from tfslurm.errors import ConfigurationError
from tfslurm.settings import Container, Instance, Prologue
from tfslurm.slurm.templates import RESERVED, Script, directives, render

GOLDEN = Path(__file__).parent / "golden"

BASE = Script(
    template="train",
    uuid="6b7c2f1e-0000-4000-8000-000000000001",
    kind="job",
    object_id="job-0000000000000001",
    folder=Path("/factory/jobs/job-0000000000000001"),
    instance=Instance(name="local", launcher="local", processes_per_node=2),
    python="/env/train/bin/python",
    core_python="/env/core/bin/python",
    root=Path("/factory"),
)
GPUS = Instance(name="gpu-2", gpus_per_node=2, processes_per_node=2, cpus_per_process=8, memory="64G")
FULL = Instance(
    name="full",
    nodes=2,
    processes_per_node=8,
    gpus_per_node=8,
    gpu_type="h100",
    cpus_per_process=12,
    memory="900G",
    time="2-00:00:00",
    partition="gpu",
    reservation="friday",
    constraint="ib&nvme",
    options={"mail-type": "FAIL", "exclusive": True, "overcommit": False, "nice": 100, "exclude": "n[1-3],n7"},
)
PROLOGUE = Prologue(
    modules=["cuda/12.8", "nccl"],
    conda="trainer",
    virtualenv="/env/some venv",
    environment={"NCCL_SOCKET_IFNAME": "ib0", "MOTTO": "it's $HOME `date`\nand more"},
    commands=["ulimit -l unlimited"],
)
IMAGE = "/images/trainer 1.sif"

CASES = {
    "train-local": BASE,
    "train-gpu": replace(BASE, instance=GPUS, config=Path("/etc/tfslurm/site.yaml")),
    "train-two-nodes-full": replace(BASE, instance=FULL, account="lab", qos="high"),
    "train-gpus-per-node": replace(BASE, instance=GPUS, gpu_request="gpus-per-node"),
    "train-prologue": replace(BASE, instance=Instance(name="p", prologue=PROLOGUE)),
    "train-apptainer": replace(
        BASE, instance=Instance(name="a", container=Container(image=IMAGE, options=["--nv", "--bind=/a b:/c"]))
    ),
    "train-pyxis": replace(
        BASE,
        instance=Instance(
            name="x", nodes=2,
            container=Container(image="nvcr.io#nvidia/pytorch", runtime="pyxis", options=["--no-container-mount-home"]),
        ),
    ),
    "train-blanks-in-paths": replace(BASE, folder=Path("/the factory/jobs/job #1"), python="/my env/bin/python"),
    "import-local": replace(BASE, template="import", kind="import", object_id="ds-0000000000000001"),
    "import-pyxis": replace(
        BASE, template="import", instance=Instance(name="x", container=Container(image="img", runtime="pyxis"))
    ),
    "serve-gpu": replace(
        BASE, template="serve", kind="endpoint", object_id="ep-0000000000000001", instance=GPUS,
        python="/env/serve/bin/python",
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return request.param, CASES[request.param]


def test_each_script_is_the_golden_one(case):
    name, script = case
    golden, text = GOLDEN / f"{name}.sh", render(script).replace(f"tfslurm {__version__}.", "tfslurm VERSION.")
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"{golden} was missing and has been written: look at it, and commit it")
    assert text == golden.read_text(), f"where this is as it should be, delete {golden} and run again"


def test_no_golden_script_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.sh")} == set(CASES)


def test_each_script_is_bash(case, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(render(case[1]))
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (apt-get install shellcheck)")
def test_shellcheck_finds_nothing_in_any_script(case, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(render(case[1]))
    # SC2016: a $ in single quotes. That is how values are written here.
    done = subprocess.run(["shellcheck", "--exclude=SC2016", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def options_of(text):
    """The #SBATCH lines as a dict; sbatch itself would see the same."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict((line.split("=", 1) + [None])[:2] for line in lines)


def test_all_that_an_instance_asks_for_is_asked_of_slurm():
    options = options_of(render(CASES["train-two-nodes-full"]))
    assert options == {
        "job-name": BASE.uuid,
        "comment": "tfslurm:job:job-0000000000000001",
        "output": "/factory/jobs/job-0000000000000001/logs/slurm.log",
        "open-mode": "append",
        "export": "NONE",
        "no-requeue": None,
        "nodes": "2",
        "ntasks-per-node": "8",
        "cpus-per-task": "12",
        "mem": "900G",
        "time": "2-00:00:00",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "reservation": "friday",
        "constraint": "ib&nvme",
        "gres": "gpu:h100:8",
        "mail-type": "FAIL",
        "exclusive": None,
        "nice": "100",
        "exclude": "n[1-3],n7",
    }


def test_gpus_are_asked_for_as_the_site_does():
    assert options_of(render(CASES["train-gpus-per-node"]))["gpus-per-node"] == "2"
    assert "gres" not in options_of(render(CASES["train-gpus-per-node"]))
    assert not {"gres", "gpus-per-node"} & options_of(render(BASE)).keys()


def test_what_does_not_train_is_one_task_with_all_the_cpus():
    options = options_of(render(CASES["serve-gpu"]))
    assert (options["ntasks-per-node"], options["cpus-per-task"]) == ("1", "16")


def test_a_percent_sign_in_the_path_is_not_a_pattern_of_sbatch():
    assert options_of(render(replace(BASE, folder=Path("/a%j"))))["output"] == "/a%%j/logs/slurm.log"


@pytest.mark.parametrize("option", sorted(RESERVED))
def test_the_options_that_the_platform_sets_are_refused(option):
    instance = Instance(name="i", options={option: "1"})
    with pytest.raises(ConfigurationError, match=f"instance 'i': the sbatch option '{option}'"):
        render(replace(BASE, instance=instance))


@pytest.mark.parametrize("option", ["a b", "a\nb", "--mem", "A", "a=b", "", "-n", "a;b"])
def test_what_is_no_option_is_refused(option):
    with pytest.raises(ConfigurationError, match="sbatch option"):
        render(replace(BASE, instance=Instance(name="i", options={option: "1"})))


ATTACKS = [
    "a\ntouch pwned", "a\n#SBATCH --uid=0", '"; touch pwned; "', "'; touch pwned; '", "$(touch pwned)", "`touch pwned`",
    "${IFS}", "a\\", "a\rb", "a\x00b", "a\x1bb",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("field", ["partition", "memory", "time", "reservation", "constraint", "gpu_type", "account"])
def test_no_directive_takes_what_could_end_its_line_or_its_quotes(field, attack):
    gpus = {"gpus_per_node": 1}
    fields = {"account": attack} if field == "account" else {"instance": Instance(name="i", **{field: attack}, **gpus)}
    with pytest.raises(ConfigurationError, match="cannot stand in an #SBATCH line"):
        render(replace(BASE, **fields))


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_free_option_takes_it_either(attack):
    with pytest.raises(ConfigurationError, match="cannot stand in an #SBATCH line"):
        render(replace(BASE, instance=Instance(name="i", options={"mail-user": attack})))


@pytest.mark.parametrize("value", ["a b", "a #b", "#b", "a#b c"])
def test_blanks_and_hashes_stay_inside_of_a_directive(value):
    line = f'#SBATCH --constraint="{value}"'
    assert line in render(replace(BASE, instance=Instance(name="i", constraint=value))).splitlines()


@pytest.mark.parametrize("name", ["A=1;x", "A B", "1A", "A\nB", "$(x)", "", "A-B"])
def test_what_is_no_variable_is_refused(name):
    prologue = Prologue(environment={name: "x"})
    with pytest.raises(ConfigurationError, match="is not a name for an environment variable"):
        render(replace(BASE, instance=Instance(name="i", prologue=prologue)))


def words_in(path):
    return path.read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if "\0" not in attack])
def test_every_value_reaches_bash_as_it_was_written(attack, tmp_path):
    # Stand-ins for all that the prologue runs say what they were given.
    prologue = Prologue(modules=[attack], conda=attack, environment={"GIVEN": attack})
    container = Container(image=attack, options=[attack])
    script = replace(
        BASE, template="import", folder=tmp_path, config=Path(attack), python=attack, core_python="true",
        instance=Instance(name="i", prologue=prologue, container=container),
    )  # fmt: skip
    # The folder is tmp_path: its path is the one in the #SBATCH line too, which takes no attack.
    stubs = f"""
    apptainer() {{ printf '%s\\0' "$@" "$GIVEN" "$TFSLURM_CONFIG" >{shlex.quote(str(tmp_path))}/given; }}
    module() {{ [[ $1 != load ]] || printf '%s\\0' "$2" >>{shlex.quote(str(tmp_path))}/prologue; }}
    conda() {{ [[ $1 != activate ]] || printf '%s\\0' "$2" >>{shlex.quote(str(tmp_path))}/prologue; }}
    """
    text = render(script).replace("set -uo pipefail", stubs + "set -uo pipefail")
    subprocess.run(["bash", "-c", text], cwd=tmp_path, check=True)
    assert words_in(tmp_path / "prologue") == [attack, attack]
    program = [attack, "-m", "tfslurm.datasets.importer", str(tmp_path)]
    assert words_in(tmp_path / "given") == ["exec", attack, attack, *program, attack, attack]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("folder", ["/a'b", '/a"b', "/a$b", "/a\nb", "/a`b", "/a\\b"])
def test_a_root_that_no_directive_can_name_is_refused(folder):
    with pytest.raises(ConfigurationError, match="cannot stand in an #SBATCH line"):
        render(replace(BASE, folder=Path(folder)))


def test_directives_come_before_any_command():
    lines = render(CASES["train-prologue"]).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if re.match(r"#SBATCH", line)]
    assert len(directives(CASES["train-prologue"])) == sum(line.startswith("#SBATCH") for line in lines[:first])
