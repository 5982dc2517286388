"""Byte sources: parts of local files and of objects in stores that fail in every way a store can."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer, serving

from data_pipeline import remote_files
from data_pipeline.errors import UserError
from data_pipeline.remote_files import PART, RemoteFiles
from data_pipeline.shard_files import LocalFiles, files_at

CONTENT = np.random.default_rng(0).bytes(PART + 100_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    (root / "a.tar").write_bytes(CONTENT)
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.01)


def remote(server: FaultyServer, patience_s: float = 5.0, timeout_s: float = 2.0) -> RemoteFiles:
    return RemoteFiles(server.url, patience_s=patience_s, timeout_s=timeout_s)


@pytest.mark.parametrize("limit", [0, 1, 32])
def test_parts_of_local_files(tmp_path: Path, limit: int) -> None:
    for n in range(3):
        (tmp_path / f"{n}").write_bytes(bytes([n]) * 100)
    files = LocalFiles(tmp_path, limit)
    for _ in range(2):
        for n in range(3):
            assert files.read(f"{n}", 90, 20) == bytes([n]) * 10
    assert list(files.read_many("1", [(0, 1), (99, 5)])) == [b"\1", b"\1"]
    with pytest.raises(FileNotFoundError):
        files.read("3", 0, 1)
    copy = pickle.loads(pickle.dumps(files))
    assert copy.read("2", 0, 1) == b"\2"
    assert not files.renew("1", 0)
    files.close()
    assert files.read("0", 0, 2) == b"\0\0"


def test_parts_of_objects(server: FaultyServer) -> None:
    files = files_at(server.url)
    assert isinstance(files, RemoteFiles)
    assert files.read("a.tar", 10, 1000) == CONTENT[10:1010]
    places = [(0, 1), (PART - 5, 10), (0, len(CONTENT)), (len(CONTENT) - 3, 100), (len(CONTENT) + 3, 5)]
    assert files.read_many("a.tar", places) == [CONTENT[o : o + n] for o, n in places]
    assert files.whole("a.tar") == CONTENT
    assert max(end - start for _, start, end in server.ranges) == PART
    assert files.meter.total.retries == 0
    assert files.meter.total.requests == sum(server.asked.values())
    with pytest.raises(FileNotFoundError):
        files.read("b.tar", 0, 5)
    assert pickle.loads(pickle.dumps(files)).read("a.tar", 3, 4) == CONTENT[3:7]
    files.close()
    assert files.read("a.tar", 3, 4) == CONTENT[3:7]


@pytest.mark.parametrize("fault", ["drop", "reset", "short", 500, 502, 503, 504, 429, 408])
def test_an_outage_is_tried_again(server: FaultyServer, fault: str | int) -> None:
    server.plan = lambda name, start, before: fault if before < 2 else None
    files = remote(server)
    assert files.read("a.tar", 100, 5000) == CONTENT[100:5100]
    total = files.meter.total
    # The client itself asks once more where a connection it had kept open was gone.
    assert total.retries == 2 if fault != "reset" else 1 <= total.retries <= 2
    assert total.requests == total.retries + 1
    server.forget()
    assert files.whole("a.tar") == CONTENT


def test_a_hanging_server_is_left_and_a_slow_one_is_not(server: FaultyServer) -> None:
    server.plan = lambda name, start, before: "hang" if before == 0 else "slow"
    files = remote(server, timeout_s=0.6)
    assert files.read("a.tar", 100, 5000) == CONTENT[100:5100]
    assert files.meter.total.retries == 1
    assert files.meter.total.bytes == 5000


@pytest.mark.parametrize("fault", ["drop", "reset", "short", "hang", 503, 429])
def test_patience_ends_with_one_line(server: FaultyServer, fault: str | int) -> None:
    server.plan = lambda name, start, before: fault
    files = remote(server, patience_s=0.3, timeout_s=0.2)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{server.url}/a\.tar: .*resumed") as caught:
        files.read("a.tar", 100, 5000)
    assert "\n" not in str(caught.value)
    assert 0.05 < time.monotonic() - started < 3
    assert files.meter.total.retries >= 1


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    files = RemoteFiles("http://127.0.0.1:9/x", patience_s=0.1)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x/a\.tar: could not be read"):
        files.read("a.tar", 0, 5)


@pytest.mark.parametrize(("fault", "text"), [(401, "refuses access"), (403, "refuses access"),
                                             (400, "answer 400"), ("ignore", "ignores Range")])  # fmt: skip
def test_a_refusal_ends_at_once(server: FaultyServer, fault: str | int, text: str) -> None:
    server.plan = lambda name, start, before: fault
    files = remote(server)
    with pytest.raises(UserError, match=text):
        files.read("a.tar", 100, 5000)
    assert sum(server.asked.values()) == 1


@pytest.mark.parametrize("fault", [404, 410])
def test_a_missing_object_is_missing_at_once(server: FaultyServer, fault: int) -> None:
    server.plan = lambda name, start, before: fault
    with pytest.raises(FileNotFoundError):
        remote(server).read("a.tar", 100, 5000)
    assert sum(server.asked.values()) == 1


def test_the_whole_of_a_file_without_ranges_is_fine_when_that_is_asked(server: FaultyServer) -> None:
    server.plan = lambda name, start, before: "ignore"
    (server.root / "small").write_bytes(b"abc")
    assert remote(server).read("small", 0, 3) == b"abc"


def test_addresses_with_secrets_are_refused() -> None:
    for address in ("https://user:word@host/x", "https://host/x?X-Amz-Signature=abc"):
        with pytest.raises(UserError, match="must not carry") as caught:
            RemoteFiles(address)
        assert "word" not in str(caught.value)
        assert "abc" not in str(caught.value)
    with pytest.raises(UserError):
        RemoteFiles("nowhere://x").read("a", 0, 1)


def test_retries_are_logged_at_a_bounded_rate(server: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    server.plan = lambda name, start, before: 503 if before < 3 else None
    files = remote(server)
    with caplog.at_level(logging.WARNING):
        for start in range(5):
            files.read("a.tar", start, 10)
    assert files.meter.total.retries == 15
    assert len(caplog.records) == 1
    assert "503" in caplog.text


def test_many_threads(server: FaultyServer) -> None:
    server.plan = lambda name, start, before: (503, "drop", None)[(before + start) % 3]
    files, right = remote(server, patience_s=20), []

    def work(n: int) -> None:
        starts = range(n * 1000, n * 1000 + 5)
        right.extend(files.read("a.tar", start, 500) == CONTENT[start : start + 500] for start in starts)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 30


def test_a_client_in_use_when_its_process_forks(server: FaultyServer) -> None:
    """Both processes go on, without a retry and without taking each other's connections."""
    files = remote(server, 60.0, 30.0)
    assert files.read("a.tar", 0, 9) == CONTENT[:9]
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                good = files.read("a.tar", 5, 9) == CONTENT[5:14]
                code = 0 if good and files.meter.total.retries == 0 else 2
            finally:
                os._exit(code)
        assert files.read("a.tar", 7, 9) == CONTENT[7:16]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert files.read("a.tar", 7, 9) == CONTENT[7:16]
    assert files.meter.total.retries == 0
