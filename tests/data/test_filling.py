import shutil

import pytest

from lightning_sae.checks import UsageError
from lightning_sae.data.filling import CacheNeeds


def needs(folder, training=900, **there):
    return CacheNeeds(training, 100, bytes_per_input=10**6, folder=folder, noun="contexts", **there)


def test_what_a_run_keeps(tmp_path):
    asked = needs(tmp_path / "there")
    assert asked.inputs == 1000
    assert asked.gigabytes == 1
    assert str(asked) == f"1,000 contexts take 1 GB in '{tmp_path}/there'"


def test_more_than_the_limit_is_refused_with_a_way_out(tmp_path):
    asked = needs(tmp_path)
    asked.require_room(1.0, may_halve=True)
    message = r"^cache_dir: 1,000 contexts .*, more than cache_limit_gb=0.9: raise it, take fewer"
    with pytest.raises(UsageError, match=message):
        asked.require_room(0.9, may_halve=False)
    with pytest.raises(UsageError, match=r"or cache_dtype=float16, with 0\.5 GB$"):
        asked.require_room(0.9, may_halve=True)


def test_more_than_the_disk_has_room_for_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"and the disk has room for 0\.3: take fewer steps$"):
        needs(tmp_path / "not" / "there").require_room(10, may_halve=False)


def test_what_others_have_kept_there_takes_room_and_what_is_there_needs_none(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**8)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (tmp_path / "activations-a.safetensors").write_bytes(bytes(5 * 10**8))
    needs(tmp_path, there=lambda: 700).require_room(1, may_halve=False)
    message = r"'.*', 0\.301 of which are not there yet, and the disk has room for 0\.3:"
    with pytest.raises(UsageError, match=message):
        needs(tmp_path, there=lambda: 699).require_room(10, may_halve=False)
    others = needs(tmp_path, training=100, there=lambda: 0)
    others.require_room(0.7, may_halve=False)
    message = r"0\.2 of which .* yet, beside 0\.5 that are: more than cache_limit_gb=0.69:"
    with pytest.raises(UsageError, match=message):
        others.require_room(0.69, may_halve=False)
