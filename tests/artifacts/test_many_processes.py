"""32 processes at once: nothing is lost, nothing happens twice, and no database is locked."""

import multiprocessing
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path

from tfslurm.artifacts.fsck import examine
from tfslurm.artifacts.manifest import verify_folder
from tfslurm.artifacts.reclaim import reclaim
from tfslurm.catalog import db, queries
from tfslurm.catalog.models import Artifact, Event, database, now
from tfslurm.catalog.queries import Page, datasets, paged
from tfslurm.catalog.views import dataset_view
from tfslurm.datasets import registry
from tfslurm.datasets.sealing import seal
from tfslurm.errors import InvalidError, NotFoundError, StatusError

PROCESSES, ROUNDS = 32, 8


def work(settings, number, ready, answers):
    """Own datasets through their whole life, and ones that all processes are after at the same moment."""
    try:
        db.connect(settings)
        ready.wait()
        said = Counter()
        for round in range(ROUNDS):
            said += own(settings, f"own-{number}-{round}", number)
            said += shared(settings, f"shared-{round}")
        answers.put(said)
    except BaseException:
        answers.put(traceback.format_exc())


def own(settings, name, number):
    made = registry.create(settings, name, "text", {})
    (settings.root.assembling(made.artifact_id) / "a.jsonl").write_text('{"text": "row"}\n' * (number + 1))
    seal(settings, made)
    assert queries.find_dataset(name).row_count == number + 1
    listed = [dataset_view(row, settings.root) for row in paged(datasets(), Artifact, Page(status="ready"))]
    assert name in {view["name"] for view in listed}
    if number % 2:
        registry.delete(made)
        Artifact.update(deleted_at=now() - timedelta(days=8)).where(Artifact.id == made.artifact_id).execute()
        reclaim(settings)
        assert name not in {row.artifact.name for row in paged(datasets(), Artifact, Page())}
        if number % 4 == 3:
            try:
                registry.restore(made)
            except StatusError:
                return Counter(reclaimed=1)
    return Counter(done=1)


def shared(settings, name):
    """Everybody creates, seals and deletes the same one: the count of what this process got done."""
    said = Counter()
    try:
        made = registry.create(settings, name, "text", {})
        said["created"] += 1
        (settings.root.assembling(made.artifact_id) / "a.jsonl").write_text('{"text": "row"}\n')
    except StatusError:
        pass
    for act in (lambda row: seal(settings, row), registry.delete):
        try:
            act(queries.find_dataset(name))
        except (NotFoundError, StatusError, InvalidError):
            pass  # somebody was quicker: deleted it, or has not written its file yet
    return said


def test_32_processes_create_seal_list_delete_and_reclaim_at_once(installation):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    database.obj.close()  # a connection must not be carried across a fork
    started = time.monotonic()
    processes = [
        context.Process(target=work, args=(installation.settings, number, barrier, answers))
        for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    said = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    print(f"{PROCESSES} processes, {ROUNDS} rounds each: {time.monotonic() - started:.1f} s")

    db.connect(installation.settings)
    assert not [answer for answer in said if isinstance(answer, str)], "\n".join(map(str, said))
    done = sum(said, Counter())
    assert done["done"] + done["reclaimed"] == PROCESSES * ROUNDS
    each_change_of_each_happened_once(done)
    for row in Artifact.select().where(Artifact.status == "ready"):
        verify_folder(Path(row.location), row.digest)
    assert database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not installation.sync().failed
    assert list(examine(installation.settings)) == []
    assert not reclaim(installation.settings, at=now() + timedelta(days=8)).failed
    assert list(examine(installation.settings, at=now() + timedelta(days=10))) == []


def each_change_of_each_happened_once(done):
    """A lost update would leave an event without its status, or two for one."""
    events = Counter((event.object_id, event.change) for event in Event.select())
    for row in Artifact.select():
        count = {change: events[row.id, change] for change in ("created", "ready", "deleted", "reclaimed")}
        assert count["created"] == 1
        assert count["reclaimed"] == (row.reclaimed_at is not None)
        last = Event.select().where(Event.object_id == row.id, Event.to_status.is_null(False)).order_by(Event.id)
        statuses = [(event.from_status, event.to_status) for event in last]
        assert [to for _, to in statuses[:-1]] == [before for before, _ in statuses[1:]]
        assert statuses[-1][1] == row.status
    shared = Artifact.select().where(Artifact.name.startswith("shared-"))
    assert done["created"] == shared.count() >= ROUNDS
    assert shared.where(Artifact.status != "deleted").count() <= ROUNDS
