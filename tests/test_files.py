import pytest

from ditq_kernels.files import check_writable, written_whole


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "it.json"
    path.write_text("old")
    with written_whole(path) as beside:
        beside.write_text("new")
        assert beside.suffix == ".json" and beside.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_directory_takes_its_place_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_whole("it") as beside:
        beside.mkdir()
        (beside / "file").write_text("new")
        assert not (tmp_path / "it").exists()
    assert (tmp_path / "it" / "file").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "it"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("directory", [False, True])
def test_a_failure_leaves_what_was_there_and_nothing_else(error, directory, tmp_path):
    path = tmp_path / "it"
    path.write_text("old")
    with pytest.raises(type(error)), written_whole(path) as beside:
        if directory:
            beside.mkdir()
            beside /= "file"
        beside.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_take_its_place_is_removed(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "file").touch()
    with pytest.raises(OSError), written_whole(tmp_path / "it") as beside:
        beside.mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "it"]


def test_what_cannot_be_written_is_said_beforehand(tmp_path, monkeypatch):
    check_writable(tmp_path / "later" / "it.json")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.TemporaryFile", _refused)
        with pytest.raises(PermissionError, match=r"it.json cannot be written: .*: Permission denied"):
            check_writable(tmp_path / "it.json")


def _refused(**_):
    raise PermissionError(13, "Permission denied")
