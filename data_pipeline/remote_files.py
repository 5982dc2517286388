"""Ranged reads from an object store or web server, tried again while it fails and as long as patience lasts.

Three kinds of failure are kept apart. An outage (5xx, throttling, time-outs, dropped connections, cut-off
answers) is tried again, with waits that double and vary. A missing or shortened object is damage, which the
reader replaces. A refusal (401, 403, no credentials, a server without ranges) ends the run at once. No error
holds any text of the store's client: it may quote keys, tokens and signed addresses.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from data_pipeline.errors import UserError, shown
from data_pipeline.traffic import Meter

log = logging.getLogger(__name__)

T = TypeVar("T")
PART = 4 << 20  # most bytes of one request: what a failure costs, and what waits in memory
TOGETHER = 8  # requests of one call at a time
TIMEOUT_S = 60.0  # for one request; 70 KB/s, below which there is no training
PATIENCE_S = 600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 15.0
LOG_EVERY_S = 10.0
OUTAGE = {408, 425, 429, 500, 502, 503, 504, 507, 508, 509, 520, 521, 522, 523, 524, 529}
#: Codes of S3 that stand for an outage and come with another status.
OUTAGE_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled"}
#: A programming or configuration error, which no waiting mends.
LASTING = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError, ValueError)

_inherited: list[Any] = []
_connecting = threading.Lock()


def _after_fork() -> None:
    global _connecting
    _connecting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Answer(Exception):
    """An answer other than the bytes asked for: its HTTP status, and seconds that it says to wait."""

    def __init__(self, status: int, wait: float = 0.0) -> None:
        self.status, self.wait = status, wait


class _CutShort(Exception):
    """Fewer bytes came than the object has."""


class RemoteFiles:
    """Ranged GETs through fsspec (`s3://`, `gs://`, `https://`, `memory://`).

    Raises FileNotFoundError for an object that is not there, `UserError` in one line where the store refuses
    or stays away for longer than `patience_s`; returns fewer bytes only where the object itself ends. Safe
    after fork, picklable, for any number of threads.
    """

    gap = 256 << 10  # bytes that cost less to read and drop than another request

    def __init__(
        self,
        root: str,
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = TIMEOUT_S,
        meter: Meter | None = None,
    ) -> None:
        from data_pipeline.locations import location

        try:
            location(root)  # refuses credentials and queries, which would end up in messages
        except ValueError as error:
            raise UserError(str(error)) from error
        self.root, self.patience_s, self.timeout_s = root.rstrip("/"), patience_s, timeout_s
        self.meter = Meter() if meter is None else meter
        self._fs: Any = None
        self._path = ""
        self._pid = -1
        self._logged = -LOG_EVERY_S

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of an object; fewer at its end."""
        return self.read_many(name, [(offset, size)])[0]

    def read_many(self, name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """`read` of several (offset, size) of one object, fetched together."""
        return self._run(self._read_many, name, places)

    def whole(self, name: str) -> bytes:
        """All bytes of an object."""

        async def ask() -> bytes:
            path = f"{self._path}/{name}"
            total = await self._persist(name, lambda: self._size(path))
            return (await self._read_many(name, [(0, total)]))[0]

        return self._run(ask)

    def renew(self, name: str, offset: int) -> bool:
        """Whether reading again may give other bytes: they may have been damaged on their way."""
        self.meter.add(damaged=1)
        return True

    def close(self) -> None:
        """Drop the client; the next read makes another."""
        self._fs, self._pid = None, -1

    def _run(self, ask: Callable[..., Awaitable[T]], *args: Any) -> T:
        import fsspec.asyn

        self._connect()
        loop = getattr(self._fs, "loop", None) or fsspec.asyn.get_loop()
        result: T = fsspec.asyn.sync(loop, ask, *args)
        return result

    async def _read_many(self, name: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
        gate = asyncio.Semaphore(TOGETHER)
        parts = [
            (n, start, min(PART, offset + size - start))
            for n, (offset, size) in enumerate(places)
            for start in range(offset, offset + size, PART)
        ]

        async def one(start: int, size: int) -> bytes:
            async with gate:
                return await self._persist(name, lambda: self._range(f"{self._path}/{name}", start, size))

        found = await _all([one(start, size) for _, start, size in parts])
        joined: list[list[bytes]] = [[] for _ in places]
        ended: set[int] = set()
        for (n, _, size), data in zip(parts, found):
            if n not in ended:
                joined[n].append(data)
            if len(data) < size:
                ended.add(n)
        return [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in joined]

    async def _persist(self, name: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer or patience ends."""
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return await asyncio.wait_for(ask(), self.timeout_s)
            except Exception as error:
                problem, wait = self._judged(error, name)
            most = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1))
            wait = max(wait, _jitter.uniform(most / 2, most))
            lasted = time.monotonic() - began
            if lasted + wait > self.patience_s:
                raise UserError(
                    f"{self._shown(name)}: could not be read for {lasted:.0f} s ({problem}; {tries} tries); "
                    "the run can be resumed when the store answers again"
                )
            self.meter.add(retries=1)
            now = time.monotonic()
            if now - self._logged >= LOG_EVERY_S:
                self._logged = now
                count = self.meter.total.retries
                log.warning("%s: %s; trying again (%d retries so far)", self._shown(name), problem, count)
            await asyncio.sleep(wait)

    def _judged(self, error: Exception, name: str) -> tuple[str, float]:
        """What an outage is called, and seconds that the store asks to wait. Raises for anything else."""
        if isinstance(error, UserError):
            raise error
        status, code = _status(error)
        if isinstance(error, _CutShort):
            return "its answers are cut short", 0.0
        if status == 404 or status == 410:
            raise FileNotFoundError(name) from None
        if status in (401, 403) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise UserError(
                f"{self._shown(name)}: the store refuses access{f' ({status})' if status else ''}; check the "
                "address, and the credentials in the environment (a missing object may look the same)"
            ) from None
        certificate = "certificate" in type(error).__name__.lower()
        refused = status is not None and status not in OUTAGE and code not in OUTAGE_CODES
        if refused or certificate or isinstance(error, (*LASTING, ImportError)):
            what = f"answer {status}" if refused else type(error).__name__
            raise UserError(
                f"{self._shown(name)}: cannot be read from its store ({what}); check the address and the "
                "store's configuration"
            ) from None
        return f"answer {status}" if status else type(error).__name__, getattr(error, "wait", 0.0)

    async def _range(self, path: str, offset: int, size: int) -> bytes:
        try:
            data, total = await self._get(path, offset, size)
        except Exception as error:
            if _status(error)[0] != 416:
                raise
            data, total = b"", None
        self.meter.add(bytes=len(data))
        if len(data) > size:
            raise self._no_ranges()
        if len(data) < size and (await self._size(path) if total is None else total) >= offset + size:
            raise _CutShort
        return data

    async def _get(self, path: str, offset: int, size: int) -> tuple[bytes, int | None]:
        """Bytes of one request, and the size of the whole object where the answer tells it."""
        self.meter.add(requests=1)
        if not _is_http(self._fs):
            ask = self._fs._cat_file if self._fs.async_impl else _in_thread(self._fs.cat_file)
            return bytes(await ask(path, start=offset, end=offset + size)), None
        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = {
            **options.pop("headers", {}),
            "Range": f"bytes={offset}-{offset + size - 1}",
            "Accept-Encoding": "identity",  # a range of a compressed body would be another range
        }
        async with session.get(self._fs.encode_url(path), headers=headers, **options) as answer:
            length = answer.content_length
            if answer.status == 200:  # the whole object, fine where that is what was asked for
                if offset or length is None or length > size:
                    raise self._no_ranges()
                return await answer.read(), length
            stated = answer.headers.get("Content-Range", "").rpartition("/")[2]
            total = int(stated) if stated.isdigit() else None
            if answer.status == 416 and total is not None:
                return b"", total
            if answer.status != 206:
                raise _Answer(answer.status, _seconds(answer.headers.get("Retry-After", "")))
            if length is not None and length > size:
                raise self._no_ranges()
            return await answer.read(), total

    async def _size(self, path: str) -> int:
        if _is_http(self._fs):  # fsspec's own `info` takes an outage for a missing file
            total = (await self._get(path, 0, 1))[1]
            if total is None:
                raise _CutShort
            return total
        ask = self._fs._info if self._fs.async_impl else _in_thread(self._fs.info)
        self._fs.invalidate_cache()
        self.meter.add(requests=1)
        return int((await ask(path))["size"])

    def _no_ranges(self) -> UserError:
        return UserError(
            f"{shown(self.root)}: the server ignores Range requests, so parts of a shard cannot be read; use "
            "one that heeds them, or copy the dataset to a disk"
        )

    def _shown(self, name: str) -> str:
        return shown(f"{self.root}/{name}")

    def _connect(self) -> None:
        """A client of this process's own: an asynchronous one does not survive a fork."""
        if self._pid == os.getpid():
            return
        with _connecting:
            if self._pid == os.getpid():
                return
            import fsspec

            protocol = self.root.partition("://")[0]
            try:
                kind = fsspec.get_filesystem_class(protocol)
                # Collecting a client made before the fork would close its connections, and take them out of
                # the event loop of the process that still uses them.
                if self._fs is not None:
                    _inherited.append(self._fs)
                if kind._pid != os.getpid():
                    _inherited.extend(kind._cache.values())
                self._fs, self._path = fsspec.core.url_to_fs(
                    self.root, skip_instance_cache=True, **_options(kind)
                )
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{protocol}:// addresses need a package that is not installed or are not known "
                    f"({type(error).__name__}); s3:// needs `pip install medfm[s3]`"
                ) from error
            if hasattr(self._fs, "retries"):
                self._fs.retries = 1  # retries are made, and counted, here
            self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        names = ("root", "patience_s", "timeout_s", "meter")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


_jitter = random.Random()  # not the one of the training process


def _options(kind: Any) -> dict[str, Any]:
    """Options of ours for a kind of file system, merged with those of fsspec's configuration."""
    import fsspec.config

    protocols = (kind.protocol,) if isinstance(kind.protocol, str) else kind.protocol
    stated: dict[str, Any] = {}
    for protocol in protocols:
        stated.update(fsspec.config.conf.get(protocol, {}))
    if "s3" in protocols:
        return {"config_kwargs": {**stated.get("config_kwargs", {}), "retries": {"total_max_attempts": 1}}}
    if "https" in protocols:  # proxies and .netrc, as with every other tool
        return {"client_kwargs": {"trust_env": True, **stated.get("client_kwargs", {})}}
    return {}


def _is_http(fs: Any) -> bool:
    return "https" in fs.protocol


def _in_thread(ask: Callable[..., T]) -> Callable[..., Awaitable[T]]:
    def call(*args: Any, **more: Any) -> Awaitable[T]:
        return asyncio.to_thread(ask, *args, **more)

    return call


async def _all(asked: list[Any]) -> list[Any]:
    """Results of all; the first error ends the others."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _status(error: Exception) -> tuple[int | None, str]:
    """HTTP status and error code that an exception stands for, whichever client made it."""
    for fault in (error, error.__cause__):
        response = getattr(fault, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    if isinstance(error, FileNotFoundError):
        return 404, ""
    if isinstance(error, PermissionError):
        return 403, ""
    if type(error).__module__.startswith("aiohttp"):  # a broken answer, whose `status` is its parser's
        return None, ""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value, ""
    return None, ""


def _seconds(text: str) -> float:
    """`Retry-After` in seconds; a date there is not heeded."""
    return min(float(text), 60.0) if text.isdigit() else 0.0
