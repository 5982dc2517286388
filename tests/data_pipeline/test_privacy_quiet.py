"""Libraries that quote a header while they read it are not heard, at the level of the process."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import warnings

import pytest

from data_pipeline.quiet import quiet_libraries


def say_it_all() -> None:
    print("python Zyxquorth")
    print("python Zyxquorth", file=sys.stderr)
    os.write(1, b"raw Zyxquorth\n")
    os.write(2, b"raw Zyxquorth\n")
    ctypes.CDLL(None).puts(b"buffered C Zyxquorth")
    warnings.warn("warned Zyxquorth", stacklevel=1)
    for name in ("pydicom", "nibabel.global", "PIL.TiffImagePlugin"):
        logging.getLogger(name).error("logged Zyxquorth")


def test_nothing_is_heard_and_all_is_heard_again(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with quiet_libraries():
        say_it_all()
    print("after")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out.split() == ["before", "after"]
    assert err == ""
    with pytest.warns(UserWarning, match="Zyxquorth"):
        say_it_all()  # and this is what would have been heard
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert out.count("Zyxquorth") == 3
    assert err.count("Zyxquorth") >= 2


def test_as_a_decorator_nested_and_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    @quiet_libraries()
    def read() -> None:
        with quiet_libraries():
            say_it_all()
        say_it_all()
        raise ValueError("refused")

    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            read()
    print("heard")
    out, err = capfd.readouterr()
    assert out.split() == ["heard"]
    assert err == ""


def test_threads_may_overlap(capfd: pytest.CaptureFixture[str]) -> None:
    """The second block outlives the first: nothing leaks between, and all is restored at the end."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet_libraries():
            first_in.set()
            second_in.wait(5)
        first_out.set()

    def second() -> None:
        first_in.wait(5)
        with quiet_libraries():
            second_in.set()
            first_out.wait(5)
            say_it_all()

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("heard")
    out, err = capfd.readouterr()
    assert out.split() == ["heard"]
    assert err == ""
