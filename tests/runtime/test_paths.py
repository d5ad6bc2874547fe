from pathlib import Path

import pytest

from rst_jax.runtime.paths import local_path


def test_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/runs") == Path("/home/somebody/runs")
    assert local_path("~") == local_path(Path("~")) == Path("/home/somebody")
    for written in ("runs/~x", "a:b/c", "c:/d", "/x//y", "a:/b"):
        assert local_path(written) == Path(written)


@pytest.mark.parametrize("written", ["gs://b/x", "s3://b", "file:///x", Path("gs://b/x"), "HTTPS://x/y"])
def test_a_storage_that_is_no_file_system_is_refused(written):
    with pytest.raises(ValueError, match="expected a path of this machine's file systems"):
        local_path(written)


def test_a_home_that_nobody_knows_is_told():
    with pytest.raises(ValueError, match=r"~nosuchuser/x: nobody knows the home folder ~nosuchuser"):
        local_path("~nosuchuser/x")
