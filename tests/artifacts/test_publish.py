import os
import stat

import pytest

from tfslurm.artifacts import manifest
from tfslurm.artifacts.publish import publish, remove_tree
from tfslurm.errors import InvalidError


def stage(folder, text="one"):
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/a").write_text(text)
    (folder / "b").write_text("two")
    manifest.write(manifest.build(folder), folder)
    return folder


@pytest.fixture
def home(tmp_path):
    yield tmp_path
    remove_tree(tmp_path)


def modes(folder):
    return {stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*") if path.is_file()}, {
        stat.S_IMODE(path.lstat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()
    }


def test_publishing_renames_and_leaves_all_read_only(home):
    listed = publish(stage(home / "staging"), home / "final")
    assert os.listdir(home) == ["final"]
    assert modes(home / "final") == ({0o444}, {0o555})
    manifest.verify_folder(home / "final", listed.digest)


def test_publishing_again_is_the_same_as_once(home):
    first = publish(stage(home / "staging"), home / "final")
    assert publish(home / "staging", home / "final") == first
    assert publish(stage(home / "staging"), home / "final") == first
    assert os.listdir(home) == ["final"]


def test_another_artifact_is_never_overwritten(home):
    first = publish(stage(home / "staging"), home / "final")
    with pytest.raises(InvalidError, match="another artifact"):
        publish(stage(home / "staging", "other"), home / "final")
    manifest.verify_folder(home / "final", first.digest)
    assert (home / "staging/sub/a").read_text() == "other"


def test_a_folder_that_is_not_what_its_manifest_lists_is_not_published(home):
    stage(home / "staging")
    (home / "staging/extra").write_text("x")
    with pytest.raises(InvalidError, match="extra: is not in the manifest"):
        publish(home / "staging", home / "final")
    with pytest.raises(InvalidError, match="has no MANIFEST"):
        publish(home / "nothing", home / "final")
    assert os.listdir(home) == ["staging"]


def test_staging_and_final_must_be_neighbours(home):
    with pytest.raises(ValueError, match="same folder"):
        publish(stage(home / "x/staging"), home / "final")


def test_a_read_only_tree_is_removed_and_links_are_not_followed(home):
    outside = home / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    stage(home / "staging")
    (home / "staging/sub/link").symlink_to(outside)
    (home / "staging/dangling").symlink_to("nowhere")
    os.chmod(home / "staging/sub", 0o555)
    os.chmod(home / "staging", 0o555)
    remove_tree(home / "staging")
    remove_tree(home / "staging")
    assert os.listdir(home) == ["outside"]
    assert (outside / "kept").read_text() == "kept"


def test_removing_what_is_a_file_or_a_link_removes_just_that(home):
    (home / "file").write_text("x")
    (home / "folder").mkdir()
    (home / "link").symlink_to("folder")
    remove_tree(home / "file")
    remove_tree(home / "link")
    assert os.listdir(home) == ["folder"]
