"""Random operations in random order: what must always hold, holds after every one of them.

TFSLURM_STATE_MACHINE names the profile: `bounded` (the default: 2,000 steps, so that every run of the suite has
some) or `full` (10,000 steps). TFSLURM_SEED repeats a run: each prints its own.
"""

import json
import os
import random
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import booleans, data, integers, sampled_from

from tfslurm import settings as configuration
from tfslurm.artifacts import manifest
from tfslurm.artifacts.fsck import examine
from tfslurm.artifacts.manifest import MANIFEST, verify_folder
from tfslurm.artifacts.publish import remove_tree
from tfslurm.artifacts.reclaim import plan, reclaim
from tfslurm.catalog import db, queries
from tfslurm.catalog.db import write_transaction
from tfslurm.catalog.lifecycle import transition
from tfslurm.catalog.models import TABLES, Artifact, BaseModel, Job, JobStatus, Lease, Submission, database, now
from tfslurm.catalog.queries import Page, datasets, paged
from tfslurm.datasets import copying, importer, importing, registry
from tfslurm.datasets.sealing import seal
from tfslurm.errors import StatusError, ValidationError
from tfslurm.files import write_json
from tfslurm.installation import install
from tfslurm.slurm import submissions
from tfslurm.slurm.executors import Handed
from tfslurm.slurm.submissions import note_ended
from tfslurm.sync import sync

PROFILES = {"bounded": (40, 50), "full": (222, 50)}
"""Examples, and steps in each."""

NAMES = ("alpha", "beta", "gamma")

GOOD, BAD = '{"text": "row %d"}\n', '{"txt": 1}\n'

steps = 0


class Inline:
    """A launcher that has run what it is given before it comes back: the importer, in this process."""

    def __init__(self, dies):
        self.dies = dies

    def submit(self, script):
        folder, code = script.parent, 1
        if not self.dies:
            code = importer.main([str(folder)])
        uuid = Submission.get(Submission.object_id == folder.name, Submission.state != "ended").uuid
        write_json(folder / "exit.json", {"uuid": uuid, "attempt": 0, "exit_code": code, "at": "2026-01-02T03:04:05Z"})
        return Handed(socket.gethostname(), "1:1")


class Catalog(RuleBasedStateMachine):
    """The model: of each dataset its name, the bytes it must have, and what it was before it was deleted."""

    def __init__(self):
        super().__init__()
        for table in reversed(TABLES):
            table.delete().execute()
        for folder in HOME.settings.root.folders:
            for path in folder.iterdir():
                remove_tree(path)
        self.settings, self.root, self.days = HOME.settings, HOME.settings.root, 0
        self.files, self.sealed, self.jobs = {}, {}, {}
        folder = self.root.model("tiny")
        folder.mkdir()
        manifest.write(manifest.build(folder), folder)
        self.model = BaseModel.create(
            name="tiny", revision="r1", digest=manifest.read(folder).digest, location=str(folder), source="",
            owner="me", created_at=now(),
        )  # fmt: skip

    # What is drawn from.

    def some(self, draw, *statuses):
        rows = [row for row in datasets().order_by(Artifact.id) if not statuses or row.artifact.status in statuses]
        return draw.draw(sampled_from(rows)) if rows else None

    # The operations.

    @initialize()
    def begin_with_some(self):
        self.create("alpha", "read")
        self.create("beta", "sealed")

    @rule(name=sampled_from(NAMES), upto=sampled_from(["created", "written", "sealed", "read", "read"]))
    def create(self, name, upto):
        taken = Artifact.select().where(Artifact.name == name, Artifact.status != "deleted").exists()
        try:
            made = registry.create(self.settings, name, "text", {})
        except StatusError:
            assert taken
            return
        assert not taken
        self.files[made.artifact_id] = {}
        if upto != "created":
            self.put(made, "a.jsonl", GOOD % 0)
        if upto in ("sealed", "read"):
            seal(self.settings, made)
            self.sealed[made.artifact_id] = {"a.jsonl": GOOD % 0}
        if upto == "read":
            self.read(made)

    def put(self, row, file, content):
        (self.root.assembling(row.artifact_id) / file).write_text(content)
        self.files[row.artifact_id][file] = content

    @rule(draw=data(), file=sampled_from(["a", "b"]), rows=integers(0, 3), good=sampled_from([True, True, True, False]))
    def write(self, draw, file, rows, good):
        row = self.some(draw, "assembling")
        if row is None or row.source:
            return
        content = "".join(GOOD % number for number in range(rows)) if good else BAD
        self.put(row, f"{file}.jsonl", content)

    @rule(draw=data(), whatever=sampled_from([False, False, True]))
    def seal(self, draw, whatever):
        row = self.some(draw) if whatever else self.some(draw, "assembling")
        if row is None:
            return
        before, written = row.artifact.status, dict(self.files.get(row.artifact_id, {}))
        try:
            seal(self.settings, row)
        except ValidationError:
            assert before == "assembling" and (BAD in written.values() or not any(written.values()))
        except StatusError:
            assert before in ("error", "deleted") or row.source
        else:
            assert before == "ready" or BAD not in written.values()
            self.sealed.setdefault(row.artifact_id, written)

    @rule(name=sampled_from(NAMES), rows=integers(1, 3), good=booleans(), dies=sampled_from([False, False, True]))
    def import_(self, name, rows, good, dies):
        source = HOME.folder / "source.jsonl"
        source.write_text("".join(GOOD % number for number in range(rows)) if good else BAD)
        monkey.setattr(submissions, "launcher", lambda *_: Inline(dies))
        try:
            made = importing.start(self.settings, name, "text", {}, str(source))
        except StatusError:
            return
        if good and not dies:
            self.sealed[made.artifact_id] = {"source.jsonl": source.read_text()}

    @rule(draw=data(), alive=sampled_from([("ready",), ("assembling", "ready", "error")]))
    def delete(self, draw, alive):
        row = self.some(draw, *alive)
        if row is None:
            return
        used = self.consumers(row) or self.importing(row)
        try:
            registry.delete(row)
            assert not used
        except StatusError:
            assert used

    @rule(draw=data())
    def restore(self, draw):
        row = self.some(draw, "deleted")
        if row is None:
            return
        gone = row.artifact.reclaimed_at is not None
        taken = Artifact.select().where(Artifact.name == row.artifact.name, Artifact.status != "deleted").exists()
        try:
            restored = registry.restore(row)
        except StatusError:
            assert gone or taken
            return
        assert not gone and not taken
        assert (restored.artifact.status == "ready") == (row.artifact_id in self.sealed)

    @rule(draw=data())
    def start_job(self, draw):
        row = self.some(draw, "ready")
        if row:
            self.read(row)

    def read(self, row):
        made = f"job-{len(self.jobs):016d}"
        self.jobs[made] = row.artifact_id
        folder = self.root.job(made).folder
        folder.mkdir()
        (folder / "training.json").write_text("{}")
        instance = self.settings.instance("auto", "training")
        with write_transaction():
            Job.create(
                id=made, name=made, status="pending", base_model=self.model, base_model_revision="r1", dataset=row,
                instance="local", config_digest=EMPTY, owner="me", created_at=now(),
            )  # fmt: skip
            submission = submissions.record(f"uuid-{made}", instance, "job", made)
            # On another machine, which only that one can look at: its end comes when `end_job` says so.
            submission.state, submission.cluster, submission.job_id = "submitted", "another-host", "1:1"
            submission.save()

    @precondition(lambda self: Job.select().where(Job.status.in_(["pending", "running"])).exists())
    @rule(draw=data(), to=sampled_from([JobStatus.ERROR, JobStatus.STOPPED]))
    def end_job(self, draw, to):
        alive = list(Job.select().where(Job.status.in_(["pending", "running"])).order_by(Job.id))
        job = draw.draw(sampled_from(alive))
        with write_transaction():
            if to is JobStatus.STOPPED:
                transition(job, JobStatus.STOPPING, actor="test")
            transition(job, to, actor="test", ended_at=now())
            note_ended(Submission.get(Submission.object_id == job.id))

    @precondition(lambda self: queries.submissions_alive())
    @rule()
    def sync(self):
        monkey.setattr(submissions, "launcher", lambda *_: Inline(True))
        Lease.delete().execute()
        assert not sync(self.settings).failed

    @rule(days=sampled_from([0, 1, 8]))
    def time_passes_and_reclaim_runs(self, days):
        self.days += days
        at = now() + timedelta(days=self.days)
        planned = [(step.action, step.ref) for step in plan(self.settings, at=at)]
        done = reclaim(self.settings, at=at)
        assert done.ran and not done.failed
        assert [(step.action, step.ref) for step in done.steps] == planned

    @rule(draw=data(), what=sampled_from(["staging", "published", "assembling", "lock"]))
    def a_killed_command_leaves_something(self, draw, what):
        row = self.some(draw)
        if row is None or self.importing(row):
            return
        status, key = row.artifact.status, row.artifact_id
        places = {
            "staging": self.root.dataset(f".staging-{key}"),
            "lock": self.root.dataset(f".lock-{key}"),
            "published": self.root.dataset(key) if status == "assembling" else None,
            "assembling": self.root.assembling(key) if status == "ready" else None,
        }
        if places[what] is None or places[what].exists():
            return
        places[what].touch() if what == "lock" else places[what].mkdir()

    @rule()
    def sync_reclaim_and_fsck(self):
        self.sync()
        self.sync()  # an import that died goes on under a new submission first
        for _ in range(2):
            self.days += 8
            assert not reclaim(self.settings, at=now() + timedelta(days=self.days)).failed
        assert list(examine(self.settings, full=True, at=now() + timedelta(days=self.days + 1.5))) == []

    # What must always hold.

    @invariant()
    def all_that_must_hold_holds(self):
        global steps
        steps += 1
        rows = {row.id: row for row in Artifact.select()}
        for row in rows.values():
            if row.status == "ready":
                self.has_just_its_bytes(row)
            elif row.status == "deleted":
                self.can_be_restored(row)
            elif row.status == "assembling":
                self.is_as_written(row)
        self.the_listing_shows_the_living(rows)
        for job in Job.select(Job.id).where(Job.status.in_(["pending", "running", "stopping"])).tuples():
            assert rows[self.jobs[job[0]]].status == "ready"

    def has_just_its_bytes(self, row):
        folder = Path(row.location)
        verify_folder(folder, row.digest, workers=1)
        assert contents(folder) == self.sealed[row.id]

    def can_be_restored(self, row):
        if row.reclaimed_at:
            assert not self.root.dataset(row.id).exists() and not self.root.assembling(row.id).exists()
        elif row.id in self.sealed:
            self.has_just_its_bytes(row)

    def is_as_written(self, row):
        if row.id in self.files:
            assert contents(self.root.assembling(row.id)) == self.files[row.id]

    def the_listing_shows_the_living(self, rows):
        """Names are unique among the living, and the deleted are hidden."""
        shown = [row.artifact for row in paged(datasets(), Artifact, Page())]
        assert len({row.name for row in shown}) == len(shown)
        assert {row.id for row in shown} == {row.id for row in rows.values() if row.status != "deleted"}

    def consumers(self, row):
        return queries.consumers_of_dataset(row.artifact_id)

    def importing(self, row):
        return any(submission.object_id == row.artifact_id for submission in queries.submissions_alive())


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST}


EMPTY = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
"""Of the two bytes `{}`."""


class Home:
    """An installation in memory: ten thousand steps would wait for a disk for minutes."""

    def __init__(self):
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="tfslurm-", dir=place))
        config = self.folder / "site.yaml"
        local = {name: {"instance": "local"} for name in ("training", "serving", "imports")}
        config.write_text(json.dumps({"root": str(self.folder / "root"), "slurm": {"command_timeout": 0.0}, **local}))
        self.settings = configuration.load(config, environ={})
        install(self.settings)
        db.connect(self.settings)


HOME = monkey = None


def test_random_operations_never_break_an_invariant(monkeypatch):
    global HOME, monkey, steps
    examples, each = PROFILES[os.environ.get("TFSLURM_STATE_MACHINE", "bounded")]
    number = int(os.environ.get("TFSLURM_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"TFSLURM_SEED={number}")
    HOME, monkey, steps = Home(), monkeypatch, 0
    monkeypatch.setattr(copying, "CLOCK_TICK", 0.0)  # nobody writes while this seals
    started = time.monotonic()
    try:
        run_state_machine_as_test(
            seed(number)(Catalog),
            settings=settings(
                max_examples=examples, stateful_step_count=each, deadline=None, database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip
    finally:
        database.obj.close()
        remove_tree(HOME.folder)
    print(f"{steps:,} steps in {time.monotonic() - started:.0f} s")
