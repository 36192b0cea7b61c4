"""The commands themselves: help, completion, and what a listing may import."""

import os
import subprocess
import sys

import click
import pytest

from tfslurm import __version__
from tfslurm.catalog.db import MIGRATIONS
from tfslurm.cli.main import COMMANDS, EXIT_CODES
from tfslurm.cli.main import cli as root

NEVER = {"torch", "transformers", "peft", "deepspeed", "vllm", "h5py", "numpy", "submitit", "jinja2"}
NEVER |= {"plotille", "matplotlib"}


def commands(group=root, path=()):
    """Every command below `group`, with its words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())


def test_every_command_has_help_with_a_text():
    assert len(ALL) > 35
    for words, command in ALL.items():
        text = command.get_help(click.Context(command, info_name=" ".join(words)))
        assert command.help, words
        assert command.get_short_help_str(), words
        assert "Usage:" in text


def test_every_option_that_is_not_plain_from_its_name_has_help():
    plain = {"lora_rank", "lora_alpha", "seed", "rows", "max_tokens", "temperature", "help"}
    for words, command in ALL.items():
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in plain:
                assert option.help, (words, option.name)


def test_the_help_lists_every_command_and_every_exit_code(cli):
    text = cli("--help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert [str(code) in EXIT_CODES for code in range(10)] == [True] * 10


def test_help_needs_no_catalog(cli):
    assert cli("--root", "/nowhere", "dataset", "create", "--help").code == 0
    assert cli("-h").code == 0


def test_the_version_is_printed_by_both_names(cli, installation):
    assert cli("--version").stdout == f"tfslurm, version {__version__}\n"
    assert installation.run("--version", check=0).stdout == f"tfslurm, version {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion_script(cli, shell):
    done = cli("completion", shell)
    assert done.code == 0
    assert f"_TFSLURM_COMPLETE={shell}_complete" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def completed(installation, line):
    """What bash offers for the last word of `line`."""
    words = line.split(" ")
    done = installation.run(_TFSLURM_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), check=0)
    return [word.partition(",")[2] for word in done.stdout.split()]


def test_commands_options_and_names_are_completed(installation):
    installation.dataset("helpdesk")
    installation.dataset("hello")
    installation.dataset("chats")
    assert completed(installation, "tfslurm data") == ["dataset"]
    assert "seal" in completed(installation, "tfslurm dataset se")
    assert completed(installation, "tfslurm dataset show hel") == ["hello", "helpdesk"]
    assert completed(installation, "tfslurm job create --dataset ch") == ["chats"]
    assert "--format" in completed(installation, "tfslurm dataset create x --fo")


def test_a_completion_without_a_catalog_offers_nothing_and_says_nothing(installation):
    installation.configure(root="/nowhere")
    assert completed(installation, "tfslurm dataset show ") == []


def test_completing_in_bash_itself(installation, program):
    installation.dataset("helpdesk")
    script = installation.run("completion", "bash", check=0).stdout
    command = program("tfslurm", f'exec {sys.executable} -m tfslurm "$@"')
    test = f"""{script}
    export TFSLURM_CONFIG='{installation.config}' PATH="{command.parent}:$PATH"
    COMP_WORDS=(tfslurm dataset show help)
    COMP_CWORD=3
    _tfslurm_completion tfslurm
    echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", test], capture_output=True, text=True)
    assert done.stdout.split() == ["helpdesk"], done.stderr


@pytest.mark.parametrize("words", [("dataset", "list"), ("dataset", "list", "--json"), ("job", "list"), ("--help",)])
def test_a_listing_imports_nothing_that_is_slow(installation, words):
    installation.job()
    environ = {**os.environ, "TFSLURM_CONFIG": str(installation.config)}
    command = [sys.executable, "-X", "importtime", "-m", "tfslurm", *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"click", "tfslurm"} <= imported
    assert not imported & NEVER


def test_init_is_idempotent_and_says_what_it_did(cli, tmp_path):
    first = cli("--root", str(tmp_path / "new"), "init", "--json").json()
    assert first["migrations"] == sorted(path.stem for path in MIGRATIONS.glob("[0-9]*.py"))
    assert cli("--root", str(tmp_path / "new"), "init", "--json").json()["migrations"] == []
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"catalog.db", "datasets", "jobs", "models"}


def test_sync_says_what_it_came_to(installation, cli):
    assert cli("sync", "--json").json() == {"alive": 0, "ran": True, "stale": None}
    job = installation.job()
    installation.trained(job)
    assert cli("sync", "--quiet").stdout == ""
    assert cli("job", "show", "first", "--json").json()["status"] == "completed"


def test_a_folder_that_cannot_be_followed_makes_sync_fail_loudly(installation, cli):
    job = installation.job()
    installation.root.job(job.id).started.write_text("{")
    done = cli("sync")
    assert done.code == 1
    assert job.id in done.stderr
    listing = cli("job", "list")
    assert listing.code == 0
    assert job.id in listing.stderr


def test_doctor_says_what_is_in_force_and_from_where(installation, cli):
    installation.configure(slurm={"grace": 5})
    rows = {row["key"]: row for row in cli("doctor", "--settings", "--json").json()}
    assert rows["slurm.grace"]["value"] == 5
    assert rows["slurm.grace"]["from"].startswith(f"{installation.config}:")
    assert "configs/site.yaml:" in rows["slurm.poll_floor"]["from"]


def test_what_is_done_is_a_sentence_for_people_and_the_object_for_scripts(installation):
    folder = installation.json("dataset", "create", "notes", "--format", "text")["location"]
    with open(f"{folder}/a.jsonl", "w") as file:
        file.write('{"text": "hello"}\n')
    installation.run("dataset", "seal", "notes", check=0)
    assert installation.json("dataset", "verify", "notes")["status"] == "ready"
    assert "is as it was sealed: sha256:" in installation.run("dataset", "verify", "notes", check=0).stdout
    assert installation.json("dataset", "delete", "notes", "--yes")["status"] == "deleted"
    assert installation.json("dataset", "restore", "notes")["status"] == "ready"
    assert installation.run("dataset", "delete", "notes", "--yes", check=0).stdout == "dataset 'notes' is deleted\n"
