"""Folders are written whole or not at all, by one process at a time, and never over what is somebody else's."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.language_models import FakeListChatModel
from safetensors.numpy import save_file

from aligner_middleware import Aligner, AlignerError, ArtifactError, BuildError, DataError, JobError
from aligner_middleware.artifact import EXPORTED, Artifact
from aligner_middleware.checkpoints.cache import build_once
from aligner_middleware.checkpoints.checkpoint import TRAINED
from aligner_middleware.data.files import write_bytes, write_lines, write_text
from aligner_middleware.data.folders import FolderKind, remove_folder, write_folder
from aligner_middleware.data.journal import Journal
from aligner_middleware.data.prompts import Prompt
from aligner_middleware.data.triples import Triple
from aligner_middleware.evaluation.pairwise import ChatJudge, OfflineJudge
from aligner_middleware.export.store import export_model
from aligner_middleware.locations import cache_dir, cached_folder
from aligner_middleware.rlhf.rounds import run_rounds
from aligner_middleware.training import TrainConfig, train
from tests.fakes import InstantAligner, artifact_folder

KIND = FolderKind("a thing", "thing.json", ("part-*",))


def tree(folder: Path) -> dict[str, str]:
    """Everything under a folder, but for locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith(".lock"):
            content = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else "/"
            found[str(path.relative_to(folder))] = content
    return found


def lay(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")
    return folder


def thing(out: Path) -> None:
    (out / "thing.json").write_text("new")


def export_to(out: Path) -> None:
    export_model("default", out, "int8")


def train_to(out: Path) -> None:
    train([Triple(question="q", answer="a", correction="c")], out, TrainConfig())


def rounds_to(out: Path) -> None:
    aligner = InstantAligner(lambda question, answer: answer)
    judge = OfflineJudge(None)  # type: ignore[arg-type]  # it is not asked
    run_rounds([Prompt(question="q")], [Prompt(question="unseen")], out, aligner, judge)


FOREIGN = [
    ("notes.txt",),
    ("photos/2024/one.jpg",),
    (".hidden",),
    ("model.onnx", "tokenizer.json"),
    ("config.json", "model.safetensors"),
    ("aligner.json", "training.json"),
]


@pytest.mark.parametrize("write", [export_to, train_to, rounds_to])
@pytest.mark.parametrize("files", FOREIGN)
def test_no_command_touches_a_folder_with_somebodys_files(
    tmp_path: Path, write: Callable[[Path], object], files: tuple[str, ...]
) -> None:
    out = lay(tmp_path / "mine", *files)
    before = tree(tmp_path)
    with pytest.raises(BuildError, match="nothing was touched"):
        write(out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("write", "files"),
    [
        (export_to, ("training.json", "adapter_model.safetensors", "adapter_config.json")),
        (train_to, ("aligner.json", "model.onnx", "tokenizer.json")),
        (train_to, ("rounds.json", "round-1/adapter/adapter_model.safetensors")),
        (rounds_to, ("training.json", "difference.safetensors")),
    ],
)
def test_what_is_ours_but_of_another_kind_is_not_replaced(
    tmp_path: Path, write: Callable[[Path], object], files: tuple[str, ...]
) -> None:
    out = lay(tmp_path / "ours", *files)
    before = tree(tmp_path)
    with pytest.raises(BuildError, match=r"is not empty, and not a.* nothing was touched"):
        write(out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", [EXPORTED, TRAINED, KIND])
def test_a_file_beside_our_own_is_named_and_stays(tmp_path: Path, kind: FolderKind) -> None:
    out = lay(tmp_path / "ours", kind.marker or "", "README.md", "notes.txt")
    before = tree(tmp_path)
    with pytest.raises(BuildError, match=r"holds 'README\.md' and 1 more, which is no part of a"):
        write_folder(out, thing, kind)
    assert tree(tmp_path) == before


def test_a_folder_in_place_of_a_file_of_ours_is_somebodys(tmp_path: Path) -> None:
    out = lay(tmp_path / "ours", "thing.json", "part-1/precious.txt")
    with pytest.raises(BuildError, match="holds 'part-1'"):
        write_folder(out, thing, KIND)
    assert (out / "part-1" / "precious.txt").exists()


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(BuildError, match="is a file, expected a folder"):
        write_folder(tmp_path / "mine", thing, KIND)
    assert (tmp_path / "mine").read_text() == "precious"


def test_files_that_come_while_it_is_built_stay(tmp_path: Path) -> None:
    out = lay(tmp_path / "out", "thing.json")

    def build(made: Path) -> None:
        thing(made)
        lay(out, "notes.txt")

    with pytest.raises(BuildError, match=r"notes\.txt"):
        write_folder(out, build, KIND)
    assert (out / "notes.txt").read_text() == "my notes.txt"
    assert sorted(tree(tmp_path)) == ["out", "out/notes.txt", "out/thing.json"]


@pytest.mark.parametrize(
    "files", [None, (), ("thing.json",), ("thing.json", "part-1", "part-2"), (".thing.json.1.tmp",)]
)
def test_a_missing_an_empty_and_an_own_folder_are_written(tmp_path: Path, files: tuple[str, ...] | None) -> None:
    out = tmp_path / "deep" / "out"
    if files is not None:
        lay(out, *files)
    write_folder(out, thing, KIND)
    assert tree(out) == {"thing.json": "new"}
    assert sorted(path.name for path in out.parent.iterdir()) == [".out.lock", "out"]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    there = lay(tmp_path / "there", "thing.json")
    (tmp_path / "link").symlink_to(there)
    write_folder(tmp_path / "link", thing, KIND)
    assert (tmp_path / "link").is_symlink()
    assert tree(there) == {"thing.json": "new"}
    foreign = lay(tmp_path / "foreign", "notes.txt")
    (tmp_path / "other").symlink_to(foreign)
    with pytest.raises(BuildError, match="nothing was touched"):
        write_folder(tmp_path / "other", thing, KIND)


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (export_to, train_to):
        with pytest.raises(
            BuildError, match="is the current folder, which cannot be replaced: name a folder inside it"
        ):
            write(Path())


def test_what_is_written_can_be_read_by_whoever_may_read_its_folder(tmp_path: Path) -> None:
    def build(made: Path) -> None:
        thing(made)
        save_file({"a": np.zeros(3)}, made / "part-1")

    write_folder(tmp_path / "out", build, KIND)
    modes = {path.stat().st_mode & 0o666 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_an_interrupted_replacement_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = lay(tmp_path / "out", "thing.json")
    before = tree(tmp_path)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "made":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            write_folder(out, thing, KIND)
    assert tree(tmp_path) == before


# What a process is killed in, for the tests below: it makes a folder for as long as a file is there.
BUILD = """
import sys, time
from pathlib import Path
from aligner_middleware.data.folders import FolderKind, write_folder
kind = FolderKind("a thing", "thing.json", ("part-*",))
out, begun, stop = map(Path, sys.argv[1:])
def build(made):
    (made / "part-1").write_text("half")
    begun.touch()
    while not stop.exists():
        time.sleep(0.01)
    (made / "thing.json").write_text("by another process")
write_folder(out, build, kind)
"""


@contextmanager
def building(out: Path, stop: Path) -> Iterator[subprocess.Popen[bytes]]:
    begun = stop.with_name(f"{out.name} begun")
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(out), str(begun), str(stop)])
    try:
        deadline = time.monotonic() + 120
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert begun.exists()
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_next_build_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    stop, place = tmp_path / "stop", tmp_path / "place"
    with building(place / "dead", stop) as dead, building(place / "living", stop) as living:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert (place / ".dead.aligner-new").exists()
        lay(place / ".mine-12345678", "precious.txt")  # looks like a temporary folder, and is not
        write_folder(place / "third", thing, KIND)
        assert not (place / ".dead.aligner-new").exists()
        assert (place / ".living.aligner-new" / "made" / "part-1").exists()
        assert (place / ".mine-12345678" / "precious.txt").exists()
        stop.touch()
        assert living.wait(60) == 0
    assert tree(place / "living") == {"part-1": "half", "thing.json": "by another process"}
    assert not list(place.glob("*.aligner-new"))


def test_a_folder_that_was_just_moved_away_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    lay(tmp_path / ".out.aligner-new" / "replaced", "thing.json")
    lay(tmp_path / ".out.aligner-new" / "made", "thing.json", "part-1")

    def fail(made: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "out", fail, KIND)
    assert tree(tmp_path) == {"out": "/", "out/thing.json": "my thing.json"}


def test_of_two_processes_one_builds_and_the_other_waits_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, stop = tmp_path / "out", tmp_path / "stop"

    with building(out, stop) as process:
        waiting = subprocess.Popen(["sh", "-c", f"sleep 1; touch '{stop}'"])
        build_once(out, lambda made: pytest.fail("it was built twice"), KIND)
        assert waiting.wait() == process.wait(60) == 0
    assert (out / "thing.json").read_text() == "by another process"
    assert f"another process is writing {out}: waiting for it" in caplog.text


def test_a_removed_folder_is_seen_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = lay(tmp_path / "out", "thing.json", "part-1")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)  # killed right here
    remove_folder(out, KIND)
    assert not out.exists()
    monkeypatch.undo()
    write_folder(tmp_path / "next", thing, KIND)
    assert sorted(tree(tmp_path)) == ["next", "next/thing.json"]
    with pytest.raises(BuildError, match=r"holds 'notes\.txt'"):
        remove_folder(lay(tmp_path / "other", "thing.json", "notes.txt"), KIND)
    assert (tmp_path / "other" / "notes.txt").exists()
    remove_folder(tmp_path / "nowhere", KIND)


@contextmanager
def little_room(size: int = 4096) -> Iterator[None]:
    """Let no file grow over so many bytes; the system then says that it is too large, as a full disk says it is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = "x" * 100_000
WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda made: (made / "part-1").write_text(LARGE),
    "ours": lambda made: write_text(made / "part-1", LARGE),
    "safetensors": lambda made: save_file({"a": np.zeros(10**5)}, made / "part-1"),
    "torch": lambda made: torch.save({"a": torch.zeros(10**5)}, made / "part-1"),
    "numpy": lambda made: np.save(made / "part-1", np.zeros(10**5)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, writer: str) -> None:
    out = lay(tmp_path / "out", "thing.json")
    before = tree(tmp_path)
    with little_room(), pytest.raises(BuildError) as caught:
        write_folder(out, WRITERS[writer], KIND)
    assert str(caught.value).startswith(f"{out} cannot be written: ")
    assert "name another folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_file_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    writes: list[Callable[[], None]] = [
        lambda: write_text(path, LARGE),
        lambda: write_bytes(path, LARGE.encode()),
        lambda: write_lines(path, [{"a": LARGE}]),
    ]
    for write in writes:
        with little_room(), pytest.raises(JobError, match="cannot be written"):
            write()
        assert tree(tmp_path) == {"file": "old"}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def rows() -> Iterator[dict[str, Any]]:
        yield {"row": 1}
        write_text(path, "other")  # while this one is being written
        yield {"row": 2}

    write_lines(path, rows())
    assert path.read_text() == '{"row": 1}\n{"row": 2}\n'
    assert sorted(tree(tmp_path)) == ["file"]


def test_a_temporary_file_of_long_ago_is_removed(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".file.1.tmp", ".file.2.tmp", ".other.1.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (1, 1))
    write_text(tmp_path / "file", "text")
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


@pytest.mark.parametrize("writing", [False, True])
def test_a_journal_on_a_full_disk_keeps_what_was_done(tmp_path: Path, writing: bool) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"job": 1}) as journal:
        journal.add("one", 1)
        with little_room(), pytest.raises(JobError, match="cannot be written: File too large"):
            journal.add("two", LARGE)
        if writing:
            journal.add("three", 3)
    with Journal(path, {"job": 1}) as journal:
        assert journal.done == ({"one": 1, "three": 3} if writing else {"one": 1})


@pytest.mark.parametrize(
    "content",
    ["[]\n", "{}\n", '{"settings": {"job": 1}}\n{"key": "a"}\n', '{"settings": {"job": 1}}\n3\n', "[" * 10**5 + "\n"],
)
def test_a_damaged_journal_is_named_by_its_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "journal"
    path.write_text(content)
    with pytest.raises(DataError, match="is no journal of this job") as caught, Journal(path, {"job": 1}):
        pass
    assert caught.value.line == content.count("\n")


def test_a_journal_that_is_a_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot be read or written"), Journal(lay(tmp_path / "folder"), {}):
        pass


def test_a_home_that_cannot_be_written_is_named_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGNER_HOME", str(tmp_path / "file" / "home"))
    folder = cached_folder("default", "int8")
    with pytest.raises(BuildError) as caught:
        build_once(folder, thing, KIND)
    message = str(caught.value)
    assert message.startswith(f"{folder} cannot be written: Not a directory")
    assert message.endswith("set ALIGNER_HOME to a folder that can be written, on a disk with room")


def test_a_home_that_can_only_be_read_serves_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay(tmp_path / "home" / "thing", "thing.json")
    monkeypatch.setattr("aligner_middleware.data.locks.FileLock", lambda path: pytest.fail("nothing is to be written"))
    build_once(folder, thing, KIND)
    assert (folder / "thing.json").read_text() == "my thing.json"


@pytest.mark.parametrize("content", [None, b"no database " * 100])
def test_verdicts_that_cannot_be_kept_are_one_error_with_what_to_set(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file" / "verdicts.sqlite" if content is None else tmp_path / "verdicts.sqlite"
    (tmp_path / "file").touch()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=rf"{path} cannot be used: .*; set ALIGNER_HOME to a folder"):
        ChatJudge(FakeListChatModel(responses=["A"]), "judge", path)


def test_without_a_home_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_HOME", "~nobody-of-this-name/cache")
    with pytest.raises(BuildError, match="set ALIGNER_HOME to a folder"):
        cache_dir()
    monkeypatch.setenv("ALIGNER_HOME", "here")
    assert cache_dir() == Path.cwd() / "here"


def test_a_damaged_folder_in_the_cache_is_built_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def check(folder: Path) -> None:
        if (folder / "thing.json").read_text() != "new":
            raise ArtifactError(f"{folder} was altered")

    for files in (("thing.json",), ("thing.json", "part-1"), ()):
        out = lay(tmp_path / "out" / str(len(files)), *files)
        if files:
            build_once(out, thing, KIND, check)
            assert tree(out) == {"thing.json": "new"}
            assert f"{out} was altered; building it anew" in caplog.text
    calls: list[Path] = []
    build_once(out, calls.append, KIND)
    assert not calls


def copy_of_default(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def test_a_cache_serves_every_place_that_the_same_files_lie_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_HOME", str(tmp_path / "home"))
    one, other = (str(copy_of_default(tmp_path / place / "default")) for place in ("env-1", "env-2/deeper"))
    assert cached_folder(one, "int8") == cached_folder(other, "int8")
    assert cached_folder(one, "int8") == cached_folder(f"{other}/../default", "int8")
    changed = str(copy_of_default(tmp_path / "env-3" / "default", b"others"))
    found = {cached_folder(one, "int8"), cached_folder(changed, "int8"), cached_folder(one, "int4")}
    found |= {cached_folder(one, "int8", "{question} {answer}"), cached_folder("default", "int8")}
    assert len(found) == 5
    monkeypatch.setattr("aligner_middleware.locations.DEFAULT_FOLDER", Path(one))
    first = cached_folder("default", "int8")
    monkeypatch.setattr("aligner_middleware.locations.DEFAULT_FOLDER", Path(other))
    assert cached_folder("default", "int8") == first


def test_large_checkpoints_of_one_size_and_time_are_told_apart(tmp_path: Path) -> None:
    found = set()
    for place, byte in (("one", 0), ("two", 0), ("three", 1)):
        folder = copy_of_default(tmp_path / place / "checkpoint", b"")
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            file.truncate(2**26 + 12345)  # a hole: it takes no room
            for block in range(0, 2**26, 2**18):  # as training changes weights: everywhere
                file.seek(block)
                file.write(bytes([byte]) * 2**18 if byte and block % 2**23 == 0 else b"")
        os.utime(path, (1, 1))
        found.add(cached_folder(str(folder), "int8"))
    assert len(found) == 2


def test_names_that_are_no_paths_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNER_HOME", str(tmp_path))
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(AlignerError) as caught:
            Aligner.load(name)
        assert len(str(caught.value)) < 1000


def test_a_named_file_of_5000_characters_is_one_error(tmp_path: Path) -> None:
    folder = artifact_folder(tmp_path / "a")
    content = json.loads((folder / "aligner.json").read_text())
    content["files"]["x" * 5000] = "0" * 64
    (folder / "aligner.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"aligner\.json"):
        Artifact.load(folder)
