"""Files of the guard are for their owner alone, and nothing but a plain file is opened under their names."""

import os
import socket
import stat

import pytest

from lib_lora_guard.private_files import make_private_folder, open_private, other_than_file

posix = pytest.mark.skipif(os.name != "posix", reason="rights of this kind")


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def open_handed():
    """A user whose new files everyone may read and write."""
    before = os.umask(0)
    yield
    os.umask(before)


@posix
def test_new_files_and_folders_are_for_their_owner_alone(tmp_path):
    folder = tmp_path / "a" / "data"
    make_private_folder(folder)
    with open_private(folder / "new", "xb") as file:
        file.write(b"one")
    with open_private(folder / "log", "ab") as file:
        file.write(b"two")
    assert (mode(folder), mode(folder / "new"), mode(folder / "log")) == (0o700, 0o600, 0o600)
    with open_private(folder / "new", "rb") as file:
        assert file.read() == b"one"
    with open_private(folder / "new", "r+b") as file:
        file.write(b"O")
    assert (folder / "new").read_bytes() == b"One"


@posix
def test_a_folder_that_is_there_is_closed_and_a_linked_one_is_not(tmp_path):
    open_one, shared = tmp_path / "data", tmp_path / "shared"
    open_one.mkdir(0o777)
    shared.mkdir(0o775)
    (tmp_path / "link").symlink_to(shared)
    make_private_folder(open_one)
    make_private_folder(tmp_path / "link")
    make_private_folder(shared, is_own=False)
    assert (mode(open_one), mode(shared)) == (0o700, 0o775)
    open_one.chmod(0o500)
    make_private_folder(open_one)
    assert mode(open_one) == 0o500, "a right that the owner has taken away"


@posix
def test_a_folder_of_another_user_is_used_as_it_is(tmp_path, monkeypatch):
    tmp_path.chmod(0o770)
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    make_private_folder(tmp_path)
    assert mode(tmp_path) == 0o770


def plant(path, kind, folder):
    """Puts something that is no plain file at `path`."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        where = os.getcwd()
        os.chdir(folder)  # a socket's path may have about a hundred bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(where)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(folder / "nothing")


@posix
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("folder", "a folder"),
        ("pipe", "a pipe"),
        ("socket", "a socket"),
        ("device", "a device"),
        ("dangling", "a link to nothing"),
    ],
)
@pytest.mark.parametrize("how", ["rb", "ab", "r+b", "xb"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, said, how):
    path = tmp_path / "x"
    plant(path, kind, tmp_path)
    with pytest.raises(OSError, match=f"^expected a file, found {said}$"):
        open_private(path, how)


@posix
def test_a_link_is_followed_to_read_and_never_to_write(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"of another program")
    link.symlink_to(real)
    assert other_than_file(link) is None
    with open_private(link, "rb") as file:
        assert file.read() == b"of another program"
    for how in ("ab", "r+b", "xb"):
        with pytest.raises(OSError, match=r"symbolic link|exists"):
            open_private(link, how)
    assert real.read_bytes() == b"of another program"


def test_nothing_and_a_file_are_no_other_thing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert other_than_file(tmp_path / "file") is None
    assert other_than_file(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError):
        open_private(tmp_path / "none", "rb")
