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
from tfslurm.slurm.directives import EXCLUDE
from tfslurm.slurm.templates import RESERVED, Array, Script, directives, render

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
ARRAY = Array(size=1000, cells=Path("/the factory/arrays/a-1/cells"), max_parallel=4)
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
    "train-array": replace(
        BASE, kind="sweep", object_id="sw-0000000000000001", folder=Path("/the factory/arrays/a-1"), instance=GPUS,
        array=ARRAY,
    ),
    "train-later-attempt": replace(BASE, instance=GPUS, first_attempt=3, exclude=("n7", "n9"), requeue=False),
    "train-never-leaves": replace(BASE, instance=GPUS, leave_seconds=0),
    "sync": replace(
        BASE, template="sync", uuid="tfslurm-sync-0123456789ab", kind="sync", object_id="sync",
        folder=Path("/factory/sync"), instance=Instance(name="cpu", cpus_per_process=2, time=10), minutes=7,
        config=Path("/etc/tfslurm/site.yaml"),
    ),
    "sync-prologue": replace(
        BASE, template="sync", uuid="tfslurm-sync-0123456789ab", kind="sync", object_id="sync",
        folder=Path("/factory/sync"), instance=Instance(name="p", prologue=PROLOGUE),
    ),
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
        "requeue": None,
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
        "signal": "B:USR2@120",
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


@pytest.mark.parametrize("option", sorted({name[:length] for name in RESERVED for length in (3, len(name) - 1)}))
def test_the_beginnings_of_those_options_are_refused_too(option):
    with pytest.raises(ConfigurationError, match="is not one that options may set"):
        render(replace(BASE, instance=Instance(name="i", options={option: "1"})))


def test_excluded_nodes_are_the_instances_and_those_that_failed():
    instance = Instance(name="i", options={EXCLUDE: "n[1-3],n7"})
    for exclude, written in (((), "n[1-3],n7"), (("n9", "n9", "n8"), "n[1-3],n7,n9,n8")):
        assert options_of(render(replace(BASE, instance=instance, exclude=exclude)))["exclude"] == written
    assert "exclude" not in options_of(render(BASE))
    with pytest.raises(ConfigurationError, match="cannot stand in an #SBATCH line"):
        render(replace(BASE, exclude=("n1\n#SBATCH --uid=0",)))
    for option in ({"exclud": "n1"}, {EXCLUDE: True}):
        with pytest.raises(ConfigurationError, match="is not one that options may set"):
            render(replace(BASE, instance=Instance(name="i", options=option)))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("1-00:00:00", 120), (1, 30), ("00:03:00", 90), ("4:00", 120), ("UNLIMITED", 120), ("0:20", 10)],
)
def test_a_job_is_told_to_leave_before_its_walltime_and_not_before_half_of_it(time, seconds):
    options = options_of(render(replace(BASE, instance=Instance(name="i", time=time))))
    assert options["signal"] == f"B:USR2@{seconds}"


def test_only_training_comes_back_and_leaves():
    assert "requeue" in options_of(render(BASE))
    assert "no-requeue" in options_of(render(CASES["train-later-attempt"]))
    assert "scontrol requeue" not in render(CASES["train-later-attempt"])
    assert "signal" not in options_of(render(CASES["train-never-leaves"]))
    for name in ("import-local", "serve-gpu"):
        assert "no-requeue" in options_of(render(CASES[name]))
        assert "signal" not in options_of(render(CASES[name]))
        assert "USR2" not in render(CASES[name]).replace("trap : TERM INT USR2", "")


def test_an_array_is_throttled_and_counts_from_zero():
    assert options_of(render(CASES["train-array"]))["array"] == "0-999%4"
    assert Array(size=1, cells=Path("/c")).indices == "0-0"
    assert "array" not in options_of(render(BASE))


def test_of_a_periodic_sync_one_runs_at_a_time():
    options = options_of(render(CASES["sync"]))
    assert (options["dependency"], options["job-name"]) == ("singleton", "tfslurm-sync-0123456789ab")
    assert "requeue" in options
    assert "--begin=now+7minutes" in render(CASES["sync"])


@pytest.fixture
def own(tmp_path):
    """Write a template of a site's own; the script then belongs to that site."""

    def own(name, text):
        folder = tmp_path / "sbatch_templates"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        return replace(BASE, config=tmp_path / "site.yaml")

    return own


def test_a_site_fills_the_blocks_of_a_packaged_template(own):
    script = own(
        "train.sh.j2",
        '{% extends "packaged/train.sh.j2" %}\n{% block before %}\nstage-in {{ folder | quote }}\n{% endblock %}\n'
        "{% block prologue %}\n{{ super() }}\nulimit -l unlimited\n{% endblock %}\n",
    )
    text, packaged = render(script), render(replace(script, config=None))
    added = [line for line in text.splitlines() if line not in packaged.splitlines()]
    assert added == [f"export TFSLURM_CONFIG={script.config}", "ulimit -l unlimited", f"stage-in {BASE.folder}"]
    assert text.index("ulimit") < text.index("stage-in") < text.index("training.prepare")


def test_a_sites_base_is_under_every_template(own):
    script = own("base.sh.j2", '{% extends "packaged/base.sh.j2" %}{% block before %}\necho here\n{% endblock %}\n')
    for template in ("train", "serve", "import"):
        assert "\necho here\n" in render(replace(script, template=template))


def test_a_site_may_replace_a_template_as_a_whole(own):
    script = own("serve.sh.j2", "#!/bin/bash\nexec {{ program }} {{ folder | quote }}\n")
    assert render(replace(script, template="serve")) == f"#!/bin/bash\nexec {BASE.python} {BASE.folder}\n"
    assert "training.prepare" in render(script)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("#!/bin/bash\n{% if %}\n", 2, "Expected an expression"),
        ("#!/bin/bash\n\n{{ nothing }}\n", 3, "'nothing' is undefined"),
        ('#!/bin/bash\n{% include "missing.j2" %}\n', 2, "missing.j2"),
        ("{{ folder | unknown }}\n", 1, "No filter named 'unknown'"),
        ("\n{{ 1 // 0 }}\n", 2, "by zero"),
        ('{% extends "packaged/train.sh.j2" %}\n{% block before %}\n{{ oops }}\n{% endblock %}\n', 3, "'oops'"),
    ],
)
def test_an_error_in_a_sites_template_says_file_and_line(own, tmp_path, text, line, said):
    with pytest.raises(ConfigurationError, match=said) as caught:
        render(own("train.sh.j2", text))
    assert caught.value.message.startswith(f"{tmp_path}/sbatch_templates/train.sh.j2, line {line}: ")


def test_what_a_value_may_not_be_is_told_as_such_also_in_a_sites_template(own):
    script = own("train.sh.j2", "#!/bin/bash\n#SBATCH --comment={{ folder | directive }}\n")
    with pytest.raises(ConfigurationError, match="cannot stand in an #SBATCH line"):
        render(replace(script, folder=Path('/a"b')))


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
