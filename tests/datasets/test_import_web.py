"""Imports from a real web server that has ranges or none, cuts connections, and changes its files."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from web_server import WebServer, text_rows

from tfslurm.datasets import download, retries
from tfslurm.datasets.download import Download
from tfslurm.datasets.sources import Source
from tfslurm.datasets.web import WebStore
from tfslurm.errors import InvalidError, NotPermittedError, UnreachableError
from tfslurm.paths import ImportPaths

CHUNK = 64 * 1024
DATA = text_rows(10 * CHUNK)


@pytest.fixture
def server():
    made = WebServer()
    yield made
    made.close()


@pytest.fixture
def fetch(tmp_path):
    """Download a URL to the spool, without waiting between tries; (bytes fetched, the files, the waits)."""

    def fetch(url, spool="import", **options):
        source, paths, waits = Source.parse(url), ImportPaths(tmp_path / spool), []
        paths.folder.mkdir(exist_ok=True)
        store = WebStore(source, timeout=5)
        fetched = Download(store, source, paths, chunk=CHUNK, wait=waits.append, **options).run()
        return fetched, {p.name: p.read_bytes() for p in paths.objects.iterdir()}, waits

    return fetch


def test_a_file_is_read_in_ranges_and_each_is_conditional(server, fetch):
    url = server.add("/data.jsonl", DATA)
    fetched, files, waits = fetch(url)
    assert (fetched, files, waits) == (len(DATA), {"data.jsonl": DATA}, [])
    spans = [(span, headers.get("If-Range")) for _, span, headers in server.requests if span != "bytes=0-0"]
    assert len(spans) == -(-len(DATA) // CHUNK)
    assert {condition for _, condition in spans} == {'"v1"'}
    assert server.sent == len(DATA)


@pytest.mark.parametrize(
    "options", [{"ranges": False}, {"etag": None, "modified": None}, {"length": False, "ranges": False}]
)
def test_without_ranges_or_without_a_version_the_file_is_read_whole(server, fetch, options):
    fetched, files, _ = fetch(server.add("/data.jsonl", DATA, **options))
    assert (fetched, files) == (len(DATA), {"data.jsonl": DATA})
    assert [span for _, span, _ in server.requests if span != "bytes=0-0"] == [""]


def test_a_weak_etag_is_no_condition_but_the_time_of_the_last_change_is(server, fetch):
    fetched, files, _ = fetch(server.add("/data.jsonl", DATA, etag='W/"1"'))
    assert files == {"data.jsonl": DATA}
    assert {headers.get("If-Range") for _, _, headers in server.requests} == {None, "Sat, 21 Nov 2026 10:00:00 GMT"}


def test_a_server_that_stops_honouring_ranges_is_read_whole(server, fetch):
    def stop(file, span):
        file.ranges = span == "bytes=0-0"

    _, files, _ = fetch(server.add("/data.jsonl", DATA, before=stop))
    assert files == {"data.jsonl": DATA}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_taken_up_where_it_broke(server, fetch, ranges):
    fetched, files, waits = fetch(server.add("/data.jsonl", DATA, ranges=ranges, cut=1000, cuts=3))
    assert files == {"data.jsonl": DATA}
    assert len(waits) == 3
    assert server.sent == len(DATA) + (0 if ranges else 3000)  # with ranges no byte comes twice


def test_a_server_that_always_cuts_is_given_up_after_a_bounded_number_of_tries(server, fetch):
    with pytest.raises(UnreachableError, match=r"/data.jsonl .* gave up after 6 tries: .*early"):
        fetch(server.add("/data.jsonl", DATA[:CHUNK], cut=10, cuts=1000))
    assert len(server.requests) == 7


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(server, fetch, status):
    _, files, waits = fetch(server.add("/data.jsonl", DATA, faults=[status, status]))
    assert files == {"data.jsonl": DATA}
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, NotPermittedError, "Unauthorized"),
        (403, NotPermittedError, "Forbidden"),
        (404, InvalidError, "no such object"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, fetch, status, error, words):
    url = server.add("/data.jsonl", DATA, faults=[status] * 9)
    with pytest.raises(error, match=words) as raised:
        fetch(f"{url}?token=very-secret")
    assert url in raised.value.message
    assert "secret" not in str(raised.value)
    assert len(server.requests) == 1


def test_a_host_that_does_not_exist_is_said_at_once(fetch, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(InvalidError, match="https://nowhere.example/a.jsonl: there is no host of that name"):
        fetch("https://nowhere.example/a.jsonl")


def test_a_server_that_is_not_there_is_given_up(fetch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError, match="gave up after 6 tries: .*refused"):
            fetch(f"http://127.0.0.1:{free.getsockname()[1]}/a.jsonl")


def test_a_file_that_is_replaced_between_two_ranges_starts_over_and_nothing_is_mixed(server, fetch):
    other = DATA.replace(b"text", b"TEXT")

    def replace(file, span):
        if span and span.startswith(f"bytes={4 * CHUNK}-"):
            file.data, file.etag = other, '"v2"'

    _, files, _ = fetch(server.add("/data.jsonl", DATA, before=replace))
    assert files == {"data.jsonl": other}


def test_a_file_that_is_replaced_once_all_is_read_starts_over(server, fetch):
    other = DATA[: 2 * CHUNK]
    looks = []

    def replace(file, span):
        if span == "bytes=0-0":
            looks.append(span)
            if len(looks) == 2:
                file.data, file.etag = other, '"v2"'

    _, files, _ = fetch(server.add("/data.jsonl", DATA, before=replace))
    assert files == {"data.jsonl": other}


def test_a_file_that_keeps_changing_is_given_up(server, fetch):
    def replace(file, span):
        file.etag = f'"{len(server.requests)}"'

    with pytest.raises(InvalidError, match="changed again and again while it was copied"):
        fetch(server.add("/data.jsonl", DATA, before=replace))


def test_a_killed_download_goes_on_where_it_was(server, fetch):
    def stop(done, total):
        if done >= 5 * CHUNK:
            raise RuntimeError("killed")

    url = server.add("/data.jsonl", DATA)
    with pytest.raises(RuntimeError):
        fetch(url, progress=stop)
    before = server.sent
    fetched, files, _ = fetch(url)
    assert files == {"data.jsonl": DATA}
    assert fetched <= len(DATA) - 1 * CHUNK  # four may have been half done
    assert server.sent - before == fetched
    server.files["/data.jsonl"].etag = '"v2"'
    assert fetch(url)[0] == len(DATA)


def test_without_a_version_nothing_is_taken_from_before(server, fetch):
    url = server.add("/data.jsonl", DATA, etag=None, modified=None)
    assert [fetch(url)[0], fetch(url)[0]] == [len(DATA)] * 2


def test_a_part_that_was_shortened_meanwhile_is_fetched_again(server, fetch, tmp_path):
    url = server.add("/data.jsonl", DATA)
    fetch(url)
    with open(tmp_path / "import/spool/objects/data.jsonl", "r+b") as file:
        file.truncate(100)
    assert fetch(url)[:2] == (len(DATA), {"data.jsonl": DATA})


def test_an_empty_file_is_one(server, fetch):
    assert fetch(server.add("/data.jsonl", b""))[:2] == (0, {"data.jsonl": b""})


def test_redirects_are_followed_and_no_credentials_go_to_another_server(server, fetch):
    elsewhere = WebServer()
    target = elsewhere.add("/blob", DATA, headers={"Content-Disposition": 'attachment; filename="x.jsonl"'})
    server.add("/a", b"", redirect="/b", login="Basic dTpwYXNzd29yZA==")
    server.add("/b", b"", redirect=target, login="Basic dTpwYXNzd29yZA==")
    _, files, _ = fetch(f"http://u:password@{server.place}/a")
    assert files == {"x.jsonl": DATA}
    assert all("Authorization" not in headers for _, _, headers in elsewhere.requests)
    elsewhere.close()


def test_a_login_may_stand_in_the_netrc(server, fetch, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login u password password\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert fetch(server.add("/a.jsonl", DATA, login="Basic dTpwYXNzd29yZA=="))[1] == {"a.jsonl": DATA}


def test_a_file_that_comes_packed_though_it_is_not_named_so_is_refused(server, fetch):
    with pytest.raises(InvalidError, match="packed as gzip"):
        fetch(server.add("/a.jsonl", DATA, headers={"Content-Encoding": "gzip"}))


def test_a_full_disk_is_said_before_anything_is_copied(server, fetch, monkeypatch):
    real = download.os.statvfs

    def full(path):
        status = list(real(path))
        status[4] = 1
        return type(real(path))(status)

    monkeypatch.setattr(download.os, "statvfs", full)
    with pytest.raises(UnreachableError, match="bytes are needed to spool and to copy it"):
        fetch(server.add("/data.jsonl", DATA))
    assert server.sent == 0


def test_the_waits_grow_and_are_bounded_and_the_server_may_ask_for_more(monkeypatch):
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: high)
    waits = []
    patience = retries.Patience("it", waits.append, tries=9)
    for _ in range(8):
        patience.lost(retries.Transient("x"))
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    with pytest.raises(UnreachableError):
        patience.lost(retries.Transient("x"))
    patience.progressed()
    patience.lost(retries.Transient("x", after=7))
    assert waits[-1] == 7


@pytest.fixture
def importer(tmp_path):
    """Run the importer as a process; the process, its outcome and its paths."""

    def importer(url, given=None, **environment):
        paths = ImportPaths(tmp_path / "imports")
        paths.folder.mkdir(exist_ok=True)
        order = {"dataset_id": "d", "source": url, "format": "text", "staging": str(tmp_path / "staging")}
        paths.config.write_text(json.dumps(order))
        if given:
            paths.source.write_text(given)
        command = [sys.executable, "-m", "tfslurm.datasets.importer", str(paths.folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        return done, json.loads(paths.outcome.read_text()) if paths.outcome.exists() else None, paths

    return importer


@pytest.mark.parametrize(
    "point", ["import-listed", "import-chunk", "import-downloaded", "ingest-listed", "import-ingested"]
)
def test_an_importer_that_is_killed_anywhere_ends_the_same_when_it_is_started_again(server, importer, tmp_path, point):
    url = server.add("/data.jsonl", DATA)
    done, outcome, paths = importer(url, TFSLURM_FAULT=point)
    assert (done.returncode, outcome) == (-9, None)
    done, outcome, _ = importer(url)
    assert (done.returncode, outcome["result"]) == (0, "succeeded")
    assert hashlib.sha256((tmp_path / "staging/data.jsonl").read_bytes()).digest() == hashlib.sha256(DATA).digest()
    assert not paths.spool.exists()
    assert json.loads(paths.progress.read_text())["phase"] == "ingest"


def test_bad_rows_are_named_as_at_the_source_and_no_secret_is_said(server, importer):
    url = server.add("/data.jsonl", b'{"text": 3}\n')
    done, outcome, paths = importer(url, f"{url}?sig=very-secret")
    assert done.returncode == 5
    assert outcome["error"].startswith(f"{url}: ")
    assert "data.jsonl:1: $.text" in outcome["error"]
    assert "very-secret" not in done.stderr + done.stdout + json.dumps(outcome)
    assert not paths.source.exists() and not paths.spool.exists()


def test_an_unexpected_error_tells_no_secret(server, importer, tmp_path):
    url = server.add("/data.jsonl", DATA)
    (tmp_path / "imports").mkdir()
    paths = ImportPaths(tmp_path / "imports")
    paths.progress.mkdir()
    done, outcome, _ = importer(url, f"{url}?sig=very-secret")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "very-secret" not in done.stderr + done.stdout + json.dumps(outcome)


def test_two_importers_of_one_import_take_turns(server, importer):
    gate = threading.Event()

    def hold(file, span):
        if span != "bytes=0-0":
            gate.wait(10)

    url = server.add("/data.jsonl", rows := text_rows(CHUNK), before=hold)
    ended = []
    threads = [threading.Thread(target=lambda: ended.append(importer(url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert [done.returncode for done, *_ in ended] == [0, 0], ended
    assert server.sent == len(rows)
