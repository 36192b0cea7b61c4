"""What scripts rely on: the keys of cli.md, the formats, and that nothing else is printed."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import yaml

from tfslurm.catalog import queries
from tfslurm.cli.output import human_size
from tfslurm.files import write_json

KEYS = {
    "dataset": "id name kind format status location size_bytes file_count row_count digest metadata owner created_at"
    " sealed_at error",
    "job": "id name status base_model base_model_revision dataset hyperparameters instance slurm_job_id attempt"
    " progress checkpoint error owner created_at started_at ended_at",
    "checkpoint": "id name kind status location size_bytes digest job base_model base_model_revision metadata",
    "endpoint": "id name status health url checkpoint instance slurm_job_id attempt serving metadata owner created_at",
    "artifact": "id kind name status size_bytes producer location digest",
    "lineage": "endpoint checkpoint job dataset base_model consumers",
}
"""From cli.md: at the least these. What is there beside them is below."""

MORE = {
    "dataset": "field_map source deleted_at reclaimed_at progress",
    "job": "kind seed location slurm_state slurm_reason estimated_start nodes sweep usage log_tail "
    "validation_dataset validation_loss best_step final_validation_loss",
    "checkpoint": "owner created_at deleted_at reclaimed_at",
    "endpoint": "kind base_model slurm_state slurm_reason estimated_start nodes error log_tail started_at ended_at",
    "artifact": "owner created_at deleted_at reclaimed_at",
    "lineage": "validation_dataset",
}


@pytest.fixture
def whole(installation):
    """A chain from dataset to endpoint."""
    installation.completed("first")
    installation.endpoint("helper")
    return installation


def keys_of(kind):
    return set(KEYS[kind].split()) | set(MORE[kind].split())


@pytest.mark.parametrize("kind", ["dataset", "job", "checkpoint", "endpoint", "artifact"])
def test_a_listing_and_a_view_have_just_the_documented_keys(whole, cli, kind):
    rows = cli(kind, "list", "--json").json()
    assert rows
    for row in rows:
        assert set(row) == keys_of(kind)
        shown = cli(kind, "show", row["id"], "--json").json()
        assert set(shown) - {"example"} == keys_of(kind)
        assert {key: shown[key] for key in row} == row


def test_a_job_reports_its_hyperparameters_unchanged_and_its_progress(installation, cli):
    given = {"learning_rate": 3e-4, "epochs": 2, "effective_batch_size": 4, "max_seq_length": 128, "lora_rank": 8,
             "lora_alpha": 12}  # fmt: skip
    job = installation.job("first", hyperparameters=given)
    progress = {"step": 1, "steps": 9, "epoch": 1, "loss": 2.5, "tokens_per_second": 10.0, "eta_seconds": 4.0}
    write_json(installation.root.job(job.id).progress, progress)
    view = cli("job", "show", "first", "--json").json()
    assert view["hyperparameters"] == given
    assert view["progress"] == progress
    assert view["checkpoint"] is None
    assert (view["dataset"], view["base_model"]) == (queries.find_dataset("chats").artifact_id, "tiny")


def test_what_is_left_out_takes_the_models_defaults_and_is_shown(installation, cli):
    installation.job("first", hyperparameters={"epochs": 5})
    shown = cli("job", "show", "first", "--json").json()["hyperparameters"]
    assert shown == {"learning_rate": 2e-4, "epochs": 5, "effective_batch_size": 16, "max_seq_length": 2048,
                     "lora_rank": 16, "lora_alpha": 32}  # fmt: skip


def test_a_configuration_that_was_changed_afterwards_is_not_believed(whole, cli):
    config = whole.root.job(queries.find_job("first").id).config
    config.chmod(0o644)
    config.write_text(config.read_text().replace('"epochs": 3', '"epochs": 4'))
    done = cli("job", "show", "first")
    assert done.code == 5
    assert f"{config} was changed after it was rendered" in done.stderr
    config.unlink()
    assert f"{config} is missing" in cli("job", "show", "first").stderr


def test_times_are_rfc_3339_in_utc_and_sizes_bytes(whole, cli):
    view = cli("dataset", "show", "chats", "--json").json()
    assert view["created_at"].endswith("Z") and "T" in view["created_at"]
    assert view["sealed_at"] >= view["created_at"]
    assert view["size_bytes"] == sum(p.stat().st_size for p in whole.root.dataset(view["id"]).glob("*.jsonl"))
    assert (view["row_count"], view["file_count"]) == (1, 1)


def test_the_lineage_of_an_endpoint_is_the_whole_chain(whole, cli):
    chain = cli("lineage", "helper", "--json").json()
    assert set(chain) == keys_of("lineage")
    assert chain["endpoint"]["checkpoint"] == chain["checkpoint"]["id"]
    assert chain["checkpoint"]["job"] == chain["job"]["id"]
    assert chain["job"]["dataset"] == chain["dataset"]["id"]
    assert chain["base_model"]["name"] == chain["job"]["base_model"] == "tiny"
    assert chain["job"]["hyperparameters"]["epochs"] == 3
    assert chain["consumers"] == []
    table = cli("lineage", "helper").stdout
    for word in ("endpoint helper", "checkpoint first", "job first", "dataset chats", "base model tiny", "epochs 3"):
        assert word in table


def test_the_lineage_downwards_names_every_consumer(whole, cli):
    chain = cli("lineage", "chats", "--json").json()
    assert [consumer["kind"] for consumer in chain["consumers"]] == ["job", "checkpoint", "endpoint"]
    assert (chain["endpoint"], chain["checkpoint"], chain["job"], chain["base_model"]) == (None, None, None, None)
    job = queries.find_job("first")
    assert [c["kind"] for c in cli("lineage", job.id, "--json").json()["consumers"]] == ["checkpoint", "endpoint"]
    checkpoint = queries.find_checkpoint("first").artifact_id
    assert [c["kind"] for c in cli("lineage", checkpoint, "--json").json()["consumers"]] == ["endpoint"]


def test_the_registry_records_both_kinds_with_their_producers(whole, cli):
    rows = cli("artifact", "list", "--json").json()
    job = queries.find_job("first").id
    produced = {row["kind"]: row["producer"] for row in rows}
    assert produced == {"checkpoint": job, "dataset": "assembled by " + rows[0]["owner"]}
    assert [row["kind"] for row in cli("artifact", "list", "--kind", "checkpoint", "--json").json()] == ["checkpoint"]


@pytest.mark.parametrize("kind", ["dataset", "job", "checkpoint", "endpoint", "artifact", "model"])
def test_every_format_holds_the_same_rows(whole, cli, kind):
    rows = cli(kind, "list", "-o", "json").json()
    lines = cli(kind, "list", "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert yaml.safe_load(cli(kind, "list", "-o", "yaml").stdout) == rows
    table = list(csv.DictReader(io.StringIO(cli(kind, "list", "-o", "csv").stdout)))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    assert list(table[0]) == list(rows[0])
    shown = cli(kind, "show", rows[0].get("id", rows[0]["name"]), "-o", "yaml").stdout
    assert yaml.safe_load(shown)["name"] == rows[0]["name"]


def test_an_empty_listing_is_empty_in_every_format(cli):
    assert cli("dataset", "list", "--json").json() == []
    assert cli("dataset", "list", "-o", "jsonl").stdout == cli("dataset", "list", "-o", "csv").stdout == ""
    assert cli("dataset", "list").stdout.split()[:3] == ["ID", "NAME", "FORMAT"]


@pytest.mark.parametrize(
    "words",
    [
        ("dataset", "list", "--json"), ("dataset", "list", "--json", "--limit", "1"),
        ("dataset", "list", "-o", "csv", "--json"), ("dataset", "list", "--json", "-o", "csv"),
    ],
)  # fmt: skip
def test_json_is_json_wherever_it_stands(installation, cli, words):
    installation.dataset()
    assert cli(*words).json()[0]["name"] == "chats"


def test_a_json_after_the_name_is_the_output_option_too(installation, cli):
    installation.dataset()
    assert cli("dataset", "show", "--json", "chats").json() == cli("dataset", "show", "chats", "--json").json()


def test_a_table_is_for_people(installation, cli):
    installation.dataset()
    header, row = cli("dataset", "list").stdout.splitlines()
    assert header.split("  ")[0] == "ID"
    assert "conversational" in row and "ready" in row and " 93 B" in row
    assert cli("dataset", "show", "chats").stdout.startswith("id ")


def test_sizes_are_written_as_people_read_them():
    sizes = [0, 1023, 1024, 1536, 20 * 2**20, 3 * 2**40]
    assert [human_size(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "20 MiB", "3.0 TiB"]


def test_a_reader_that_leaves_early_sees_no_complaint(installation):
    for number in range(300):
        from tfslurm.datasets import registry

        registry.create(installation.settings, f"d{number}", "text", {})
    environ = {**os.environ, "TFSLURM_CONFIG": str(installation.config)}
    for output in ("table", "json", "jsonl", "csv", "yaml"):
        command = f"set -o pipefail; {sys.executable} -m tfslurm dataset list -o {output} | head -1"
        done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), output
        assert len(done.stdout.splitlines()) == 1


def test_deleted_datasets_are_hidden_unless_asked_for(installation, cli):
    installation.dataset("kept")
    installation.dataset("gone")
    assert cli("dataset", "delete", "gone", "--yes").code == 0
    assert [row["name"] for row in cli("dataset", "list", "--json").json()] == ["kept"]
    assert [row["name"] for row in cli("dataset", "list", "--status", "deleted", "--json").json()] == ["gone"]
    assert cli("dataset", "show", "gone", "--json").json()["status"] == "deleted"


def test_events_tell_who_did_what_and_when(whole, cli):
    events = cli("job", "events", "first", "--json").json()
    assert [event["change"] for event in events] == ["created", "running", "completed"]
    assert [event["actor"] for event in events][1:] == ["sync", "sync"]
    assert [(event["from"], event["to"]) for event in events][-1] == ("running", "completed")


def test_logs_and_metrics_are_printed_as_they_are(whole, cli):
    paths = whole.root.job(queries.find_job("first").id)
    paths.log(0).write_text("first attempt\n")
    paths.log(1).write_text("second attempt\n")
    paths.metrics.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n')
    assert cli("job", "logs", "first").stdout == "first attempt\nsecond attempt\n"
    assert cli("job", "logs", "first", "--follow").stdout == "first attempt\nsecond attempt\n"
    assert [row["loss"] for row in cli("job", "metrics", "first", "--json").json()] == [2.5, 1.5]


def test_a_dry_run_prints_everything_and_makes_nothing(installation, cli):
    installation.plan()
    before = installation.everything()
    done = cli("job", "create", "--model", "tiny", "--dataset", "chats", "--dry-run")
    assert done.code == 0
    for title in ("# --- training.json", "# --- deepspeed.json", "# --- script.sh", "#!/bin/bash"):
        assert title in done.stdout
    parsed = cli("job", "create", "--model", "tiny", "--dataset", "chats", "--dry-run", "--json").json()
    assert parsed.keys() == {"training", "deepspeed", "script", "memory", "test_only"}
    assert parsed["training"]["dataset"]["name"] == "chats"
    assert parsed["deepspeed"]["zero_optimization"]["stage"] == 1
    assert parsed["test_only"] is None  # there is no Slurm on the local instance
    assert installation.everything() == before


def test_the_chain_of_dataset_commands(cli, installation):
    made = cli("dataset", "create", "chats", "--format", "conversational", "--json").json()
    assert made["status"] == "assembling"
    path = cli("dataset", "path", "chats").stdout.strip()
    assert path == made["location"]
    with open(f"{path}/a.jsonl", "w") as file:
        file.write('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n')
    sealed = cli("dataset", "seal", "chats", "--json").json()
    assert (sealed["status"], sealed["row_count"], sealed["id"]) == ("ready", 1, made["id"])
    assert cli("dataset", "seal", "chats", "--json").json() == sealed
    assert "as it was sealed" in cli("dataset", "verify", "chats").stdout
    assert json.loads(cli("dataset", "head", "chats", "-n", "1").stdout)["messages"][1]["content"] == "yo"
    assert [event["change"] for event in cli("dataset", "events", "chats", "--json").json()] == ["created", "ready"]
