import subprocess

import pytest

from tfslurm.artifacts import manifest
from tfslurm.artifacts.manifest import MANIFEST, Entry, Manifest
from tfslurm.errors import InvalidError


@pytest.fixture
def folder(tmp_path):
    files = {"b.jsonl": b"two\n", "a/é x.jsonl": b"one\n", "a.jsonl": b"", "# odd": b"#"}
    for name, data in files.items():
        path = tmp_path / "artifact" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest.write(manifest.build(tmp_path / "artifact"), tmp_path / "artifact")
    return tmp_path / "artifact"


def digest(folder):
    return manifest.read(folder).digest


def test_a_manifest_lists_every_file_in_bytewise_order_and_reads_back(folder):
    listed = manifest.read(folder)
    assert [(entry.path, entry.size) for entry in listed.entries] == [
        ("# odd", 1),
        ("a.jsonl", 0),
        ("a/é x.jsonl", 4),
        ("b.jsonl", 4),
    ]
    assert listed == manifest.build(folder)
    assert listed.size == 9


def test_sha256sum_checks_it_and_computes_the_same_digest(folder):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=folder, check=True)
    output = subprocess.run(["sha256sum", MANIFEST], cwd=folder, check=True, capture_output=True, text=True).stdout
    assert digest(folder) == "sha256:" + output.split()[0]
    (folder / "b.jsonl").write_bytes(b"owt\n")
    assert subprocess.run(["sha256sum", "--check", "--status", MANIFEST], cwd=folder).returncode == 1


def test_the_digest_depends_on_paths_sizes_and_bytes_alone():
    entries = [Entry("a", 1, "0" * 64), Entry("b", 2, "1" * 64)]
    same = {Manifest.of(entries).digest, Manifest.of(reversed(entries)).digest}
    assert len(same) == 1
    for other in (Entry("c", 2, "1" * 64), Entry("b", 3, "1" * 64), Entry("b", 2, "2" * 64)):
        assert Manifest.of([entries[0], other]).digest not in same


@pytest.mark.parametrize("path", ["a\nb", "a\\b", "a\x7f", "\udcff", "../a", "/a", "a//b", ".", "", MANIFEST])
def test_paths_that_a_manifest_cannot_hold_are_refused(path):
    with pytest.raises(InvalidError):
        Entry(path, 1, "0" * 64)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"# tfslurm manifest 1", b"# tfslurm manifest 2", ":1: expected"),
        (b"# 0 bytes\n", b"", "cut off"),
        (b"# 0 bytes", b"# no bytes", ":4: not a size line"),
        (b"a.jsonl", b"z.jsonl", "not in order"),
        (b"b.jsonl\n", b"b.jsonl", "cut off"),
    ],
)
def test_a_damaged_manifest_is_refused(folder, old, new, says):
    text = (folder / MANIFEST).read_bytes().replace(old, new)
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(InvalidError, match=says):
        manifest.read(folder)


def test_an_untouched_folder_verifies_and_tells_its_progress(folder):
    seen = []
    manifest.verify_folder(folder, digest(folder), workers=2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (9, 9)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "b.jsonl").write_bytes(b"twp\n"), "b.jsonl: its bytes have changed"),
        (lambda folder: (folder / "b.jsonl").write_bytes(b"two"), "b.jsonl: has 3 bytes, not 4"),
        (lambda folder: (folder / "b.jsonl").unlink(), "b.jsonl: is missing"),
        (lambda folder: (folder / "a/c").write_bytes(b""), "a/c: is not in the manifest"),
        (lambda folder: (folder / "c").symlink_to("b.jsonl"), "c: neither a regular file nor a folder"),
        (lambda folder: (folder / MANIFEST).unlink(), "has no MANIFEST"),
    ],
)
def test_damage_is_found_and_named(folder, damage, says):
    expected = digest(folder)
    damage(folder)
    with pytest.raises(InvalidError, match=says):
        manifest.verify_folder(folder, expected)


def test_a_manifest_that_was_rewritten_with_its_files_is_found_by_the_recorded_digest(folder):
    expected = digest(folder)
    (folder / "b.jsonl").write_bytes(b"owt\n")
    manifest.write(manifest.build(folder), folder)
    with pytest.raises(InvalidError, match="not sha256:.* as recorded"):
        manifest.verify_folder(folder, expected)


def test_every_damaged_file_is_named_up_to_ten(tmp_path):
    for number in range(15):
        (tmp_path / f"{number:02}").write_bytes(b"a")
    manifest.write(manifest.build(tmp_path), tmp_path)
    for number in range(12):
        (tmp_path / f"{number:02}").write_bytes(b"b")
    with pytest.raises(InvalidError, match=r"(?s)/00: .*/09: .*… and 2 more"):
        manifest.verify_folder(tmp_path, digest(tmp_path))
