"""Imports from a real S3 server: moto's, in a process of its own."""

import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest

from tfslurm.catalog.models import Submission
from tfslurm.datasets import stores
from tfslurm.datasets.download import Download
from tfslurm.datasets.importer import ImportConfig, fetch
from tfslurm.datasets.retries import Transient
from tfslurm.datasets.sources import Source
from tfslurm.datasets.stores import open_store
from tfslurm.errors import InvalidError, NotPermittedError, UnreachableError, ValidationError
from tfslurm.paths import ImportPaths
from tfslurm.slurm import local

for package in ("s3fs", "moto", "boto3"):
    pytest.importorskip(
        package, reason=f"imports from S3 are NOT tested: {package} is missing, install tfslurm[s3,test]"
    )

from web_server import text_rows  # noqa: E402

CHUNK = 64 * 1024
DATA = text_rows(6 * CHUNK)

START = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def endpoint():
    process = subprocess.Popen(
        [sys.executable, "-c", START],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    port = next(line.split()[1] for line in process.stdout if line.startswith("port"))
    yield f"http://127.0.0.1:{port}"
    process.communicate("", timeout=20)


@pytest.fixture
def s3(endpoint, monkeypatch, tmp_path):
    """A client of an empty server with the bucket `chats`; credentials are in the usual files of a home folder."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = me\naws_secret_access_key = hush\n")
    (tmp_path / ".aws/config").write_text(f"[default]\nendpoint_url = {endpoint}\nregion = us-east-1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()
    client = boto3.client("s3")
    client.create_bucket(Bucket="chats")
    return client


@pytest.fixture
def put(s3):
    def put(**objects: bytes):
        for key, data in objects.items():
            s3.put_object(Bucket="chats", Key=key, Body=data)

    return put


@pytest.fixture
def get(tmp_path):
    """Download a source, without waiting between tries; (bytes fetched, the files by name)."""

    def get(url, **options):
        source, paths = Source.parse(url), ImportPaths(tmp_path / "import")
        paths.folder.mkdir(exist_ok=True)
        options = {"chunk": CHUNK, "wait": lambda seconds: None} | options
        fetched = Download(options.pop("store", None) or open_store(source), source, paths, **options).run()
        files = [path for path in paths.objects.rglob("*") if path.is_file()]
        return fetched, {str(path.relative_to(paths.objects)): path.read_bytes() for path in files}

    return get


def test_an_object_is_copied_under_its_own_name(put, get):
    put(**{"deep/down/train.jsonl": DATA})
    assert get("s3://chats/deep/down/train.jsonl") == (len(DATA), {"train.jsonl": DATA})


def test_a_folder_keeps_its_subfolders_and_a_bucket_is_one(put, get):
    put(**{"top/a.jsonl": b"1", "top/deep/b.jsonl": b"2", "top/.hidden": b"3", "topmost/c.jsonl": b"4", "top/": b""})
    _, files = get("s3://chats/top")
    assert files == {"a.jsonl": b"1", "deep/b.jsonl": b"2", ".hidden": b""}
    _, files = get("s3://chats")
    assert set(files) == {"top/a.jsonl", "top/deep/b.jsonl", "top/.hidden", "topmost/c.jsonl"}


def test_a_glob_copies_what_it_matches_below_the_folder_that_is_common(put, get):
    put(**{"x/1/train.jsonl": b"1", "x/2/train.jsonl": b"2", "x/2/test.jsonl": b"3"})
    assert get("s3://chats/x/*/train.jsonl")[1] == {"1/train.jsonl": b"1", "2/train.jsonl": b"2"}
    assert get("s3://chats/**/test.jsonl")[1] == {"test.jsonl": b"3"}


def test_a_name_with_the_characters_of_a_glob_is_a_name_where_it_exists(put, get):
    put(**{"a[1].jsonl": b"1", "a1.jsonl": b"2"})
    assert get("s3://chats/a[1].jsonl")[1] == {"a[1].jsonl": b"1"}


@pytest.mark.parametrize(
    "url", ["s3://nowhere/x.jsonl", "s3://chats/missing.jsonl", "s3://chats/missing/*.jsonl", "s3://nowhere"]
)
def test_what_is_not_there_is_named(s3, get, url):
    with pytest.raises(InvalidError, match=re.escape(url)):
        get(url)


def test_without_credentials_it_says_where_they_come_from(s3, get, tmp_path):
    (tmp_path / ".aws/credentials").unlink()
    with pytest.raises(NotPermittedError, match="s3://chats/x.jsonl: no usable credentials") as raised:
        get("s3://chats/x.jsonl")
    assert "usual files" in raised.value.hint


@pytest.mark.parametrize("key", ["top/../../../evil.jsonl", "top//a.jsonl", "top/./a.jsonl", f"top/{'x' * 300}.jsonl"])
def test_a_key_that_would_leave_the_spool_is_refused(s3, put, get, tmp_path, key):
    put(**{key: b"1"})
    with pytest.raises(InvalidError, match="rename it|no file can be called"):
        get("s3://chats/top")
    assert not list(tmp_path.rglob("evil*"))


def test_an_object_that_is_a_folder_too_is_refused(put, get):
    put(**{"top/a": b"1", "top/a/b.jsonl": b"2"})
    with pytest.raises(InvalidError, match="an object and a folder at once"):
        get("s3://chats/top")


def test_what_a_folder_may_not_hold_is_refused_by_name_before_anything_is_copied(put, tmp_path):
    put(**{"top/a.jsonl": DATA, "top/README.md": b"# hi", "top/old.csv": b"a,b", "top/A.jsonl": b""})
    paths = ImportPaths(tmp_path / "import")
    paths.folder.mkdir()
    with pytest.raises(ValidationError) as raised:
        fetch(paths, ImportConfig(dataset_id="d", source="s3://chats/top", format="text", staging="x"))
    assert raised.value.report["errors"] == {"unsupported_file": 2, "case_clash": 1}
    assert str(tmp_path) not in str(raised.value.report) + str(raised.value)
    assert "README.md" in str(raised.value)
    assert not any((paths.objects / "a.jsonl").read_bytes()[:1000])


def test_an_object_that_is_replaced_under_way_starts_over(put, get):
    put(**{"a.jsonl": DATA, "b.jsonl": DATA})
    other, seen = DATA.replace(b"text", b"TEXT"), []

    def replace(done, total):
        if done > 3 * CHUNK and not seen:
            seen.append(done)
            put(**{"a.jsonl": other})

    fetched, files = get("s3://chats", progress=replace)
    assert files == {"a.jsonl": other, "b.jsonl": DATA}
    assert len(DATA) * 2 <= fetched < len(DATA) * 3 + CHUNK  # b was not fetched again


def test_objects_that_come_and_go_under_way_are_seen(s3, put, get):
    put(**{"a.jsonl": DATA, "b.jsonl": DATA})
    seen = []

    def change(done, total):
        if done > CHUNK and not seen:
            seen.append(done)
            s3.delete_object(Bucket="chats", Key="b.jsonl")
            put(**{"c.jsonl": b"new"})

    _, files = get("s3://chats", progress=change)
    assert files == {"a.jsonl": DATA, "c.jsonl": b"new"}


def test_what_was_downloaded_by_one_that_was_killed_is_not_downloaded_again(put, get):
    put(**{"a.jsonl": DATA, "b.jsonl": DATA})

    def stop(done, total):
        if done > 8 * CHUNK:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        get("s3://chats", progress=stop)
    fetched, files = get("s3://chats")
    assert files == {"a.jsonl": DATA, "b.jsonl": DATA}
    assert fetched <= len(DATA)
    put(**{"a.jsonl": DATA[:CHUNK]})
    assert get("s3://chats") == (CHUNK, {"a.jsonl": DATA[:CHUNK], "b.jsonl": DATA})


def test_a_server_that_fails_for_a_while_is_asked_again_and_one_that_goes_on_is_given_up(s3, put, get, monkeypatch):
    put(**{"a.jsonl": DATA})
    store, failures = open_store(Source.parse("s3://chats/a.jsonl")), [0]
    real = store.read

    def read(remote, start, end):
        failures[0] += 1
        if failures[0] <= 3:
            raise Transient("the server answers 503")
        yield from real(remote, start, end)

    monkeypatch.setattr(store, "read", read)
    assert get("s3://chats/a.jsonl", store=store)[1] == {"a.jsonl": DATA}
    failures[0] = -10_000  # and goes on
    put(**{"a.jsonl": DATA[1:]})
    with pytest.raises(
        UnreachableError, match=r"s3://chats/a.jsonl \(a.jsonl\): gave up after 6 tries: the server answers 503"
    ):
        get("s3://chats/a.jsonl", store=store)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("tfslurm.datasets.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidError, match="s3fs") as raised:
        open_store(Source.parse("s3://chats/a.jsonl"))
    assert raised.value.hint == "pip install 'tfslurm[s3]'"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, Transient), ("InternalError", 500, Transient), ("RequestTimeout", 408, Transient),
        ("AccessDenied", 403, NotPermittedError), ("NoSuchBucket", 404, InvalidError), ("BadDigest", 400, InvalidError),
    ],
)  # fmt: skip
def test_what_s3_answers_is_told_apart(code, status, kind):
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": "so it is"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(kind, match="so it is"), stores.translated(Source.parse("s3://chats/a.jsonl")):
        raise translate_boto_error(ClientError(answer, "GetObject"))


def test_a_fault_of_ours_is_not_taken_for_the_servers():
    with pytest.raises(ZeroDivisionError), stores.translated(Source.parse("s3://chats/a.jsonl")):
        raise ZeroDivisionError


@pytest.mark.parametrize("where", ["environment", "file", "nowhere: it is public"])
def test_a_bucket_is_imported_through_the_product_and_no_credential_is_kept(
    installation, until, put, s3, endpoint, monkeypatch, tmp_path, where
):
    put(**{"top/a.jsonl": DATA, "top/deep/b.jsonl": DATA})
    environment = {"AWS_CONFIG_FILE": str(tmp_path / ".aws/config"), "AWS_EC2_METADATA_DISABLED": "true"}
    if where == "environment":
        (tmp_path / ".aws/credentials").unlink()
        environment |= {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "hush-hush"}
    elif where != "file":
        (tmp_path / ".aws/credentials").unlink()
        s3.put_bucket_acl(Bucket="chats", ACL="public-read")
        for key in ("top/a.jsonl", "top/deep/b.jsonl"):
            s3.put_object_acl(Bucket="chats", Key=key, ACL="public-read")
        (tmp_path / ".config/fsspec").mkdir(parents=True)
        (tmp_path / ".config/fsspec/s3.json").write_text('{"s3": {"anon": true}}')
    words = ("dataset", "import", "copied", "s3://chats/top", "--format", "text", "--wait", "--json")
    done = installation.run(*words, check=0, **environment)
    shown = json.loads(done.stdout)
    assert (shown["status"], shown["source"], shown["file_count"]) == ("ready", "s3://chats/top", 2)
    folder = installation.root.dataset(shown["id"])
    assert (folder / "deep/b.jsonl").read_bytes() == DATA
    until(lambda: not local.alive(Submission.get().job_id))
    kept = b"".join(path.read_bytes() for path in installation.root.path.rglob("*") if path.is_file())
    assert b"hush" not in kept + done.stderr.encode()
