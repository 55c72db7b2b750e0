"""The simulated allocator: its rules, and what PyTorch's own has recorded on a device."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest

from s2a_cli.common.errors import UserError
from s2a_cli.memory.allocator import Allocator, is_expandable, reserved
from s2a_cli.memory.margin import Margin
from s2a_cli.memory.replay import replay

MIB = 2**20
RECORDED = sorted((Path(__file__).parents[2] / "benchmarks" / "cuda" / "snapshots").glob("*.pickle.gz"))


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([512], 2),  # the small pool
        ([MIB, MIB], 2),
        ([MIB, MIB, 512], 4),
        ([MIB + 512], 20),  # the large one
        ([9 * MIB, 9 * MIB], 20),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40),
        ([10 * MIB], 10),  # a segment of its own, in steps of 2 MiB
        ([11 * MIB], 12),
        ([11 * MIB, 2 * MIB], 32),
    ],
)
def test_segments(sizes, expected):
    allocator = Allocator()
    addresses = [allocator.take(size) for size in sizes]
    assert len(set(addresses)) == len(sizes) and allocator.reserved == expected * MIB


def test_blocks_are_joined_and_used_again():
    allocator = Allocator()
    blocks = [allocator.take(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for block in (blocks[1], blocks[3], blocks[2]):
        allocator.give(block)
    assert allocator.take(15 * MIB) == blocks[1] and allocator.reserved == 20 * MIB


def test_a_hole_that_is_too_small_is_fragmentation():
    allocator = Allocator()
    a, b = allocator.take(12 * MIB), allocator.take(12 * MIB)
    allocator.give(a)
    allocator.take(11 * MIB + 512)  # what is left of the hole, less than 1 MiB, is not split off
    allocator.take(MIB - 512)
    assert allocator.reserved == 26 * MIB
    allocator.give(b)
    allocator.take(13 * MIB)
    assert allocator.reserved == 26 * MIB + 14 * MIB


def test_repeated_steps_take_no_more():
    step = [(0, 30 * MIB), (1, 3 * MIB), (2, 25 * MIB), (1, -3 * MIB), (2, -25 * MIB)]
    assert reserved(step, begins_at=1, steps=1) == reserved(step, begins_at=1, steps=9) == (30 + 20 + 26) * MIB


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([512, MIB], 2),
        ([MIB, MIB, 512], 4),
        ([MIB + 512, 9 * MIB, 9 * MIB], 20),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40),
        ([21 * MIB, 512], 40 + 2),
        ([30 * MIB, 30 * MIB], 60),
    ],
)
def test_expandable_segments_grow_at_their_end(sizes, expected):
    allocator = Allocator(expandable=True)
    addresses = [allocator.take(size) for size in sizes]
    assert len(set(addresses)) == len(sizes) and allocator.reserved == expected * MIB


def test_an_expandable_segment_takes_its_last_block_where_no_other_fits():
    allocator = Allocator(expandable=True)
    a, b = allocator.take(12 * MIB), allocator.take(2 * MIB)  # 6 of 20 MiB remain
    allocator.give(a)
    assert allocator.take(5 * MIB) == a and allocator.reserved == 20 * MIB  # not the last one, which is smaller
    allocator.give(b)
    assert allocator.take(30 * MIB) == a + 5 * MIB  # the 15 MiB that are free at the end, and a step of 20
    assert allocator.reserved == 40 * MIB


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.partition(".")[0])
def test_the_simulation_takes_what_a_device_has_taken(path):
    found = replay(path)
    assert found.simulated == found.recorded and found.before == 0 and found.events > 3000
    twin = path.with_name(path.name.replace("-expandable", "")) if found.expandable else None
    if twin:
        assert found.otherwise == replay(twin).recorded and not replay(twin).expandable


def snapshot(expandable: bool = False) -> dict:
    """Two blocks that were there before, of which one is freed; two that come, and a segment for the second."""

    def event(action: str, address: int, size: int) -> dict:
        return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 0, "frames": []}

    def block(address: int, size: int, state: str) -> dict:
        return {"address": address, "size": size, "requested_size": size, "state": state, "frames": []}

    trace = [
        event("free_requested", 0, 8 * MIB - 100),
        event("free_completed", 0, 8 * MIB - 100),
        event("alloc", 0, 3 * MIB),
        event("segment_map" if expandable else "segment_alloc", 32 * MIB, 20 * MIB),
        event("alloc", 32 * MIB, 15 * MIB),
        event("snapshot", 0, 0),
    ]
    blocks = [
        block(0, 3 * MIB, "active_allocated"),
        block(3 * MIB, 5 * MIB, "inactive"),
        block(8 * MIB, 9 * MIB, "active_allocated"),
        block(17 * MIB, 3 * MIB, "inactive"),
    ]
    more = [block(32 * MIB, 15 * MIB, "active_allocated"), block(47 * MIB, 5 * MIB, "inactive")]
    segments = [
        {"device": 0, "address": 0, "total_size": 20 * MIB, "stream": 0, "is_expandable": expandable, "blocks": blocks},
        {
            "device": 0,
            "address": 32 * MIB,
            "total_size": 20 * MIB,
            "stream": 0,
            "is_expandable": expandable,
            "blocks": more,
        },
    ]
    return {"segments": segments, "device_traces": [trace], "allocator_settings": {"expandable_segments": expandable}}


def written(tmp_path: Path, content: object, pack: bool = False) -> Path:
    path, text = tmp_path / "memory_snapshot.pickle", pickle.dumps(content)
    path.write_bytes(gzip.compress(text) if pack else text)
    return path


@pytest.mark.parametrize("pack", [False, True])
def test_what_was_there_before_the_recording_is_reconstructed(tmp_path, pack):
    found = replay(written(tmp_path, snapshot(), pack))
    assert (found.device, found.events, found.before, found.expandable) == (0, 3, 2, False)
    assert found.recorded == 40 * MIB and found.allocated == (9 + 3 + 15) * MIB
    assert found.simulated == 20 * MIB + 16 * MIB  # the device's own segment was of 20 MiB for another request
    assert found.otherwise == 40 * MIB


class Runs:
    def __reduce__(self):
        return Path.unlink, (Path("never"),)


@pytest.mark.parametrize(
    "content, said",
    [
        (Runs(), "names pathlib.Path"),
        ([1, 2], "holds no dictionary"),
        ({"segments": []}, "KeyError: 'device_traces'"),
        ({"segments": [], "device_traces": [[{"action": "alloc"}]]}, "KeyError"),
        ({"segments": [], "device_traces": [[]]}, "_record_memory_history"),
        ({"segments": [], "device_traces": 3}, "TypeError"),
    ],
)
def test_what_is_no_snapshot_is_said_in_a_line(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as caught:
        replay(written(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"\x1f\x8bnothing", b"text"])
def test_what_is_damaged_is_said_in_a_line(tmp_path, text):
    (tmp_path / "cut.pickle").write_bytes(text)
    with pytest.raises(UserError, match=r"cut.pickle: no memory snapshot of PyTorch, or damaged"):
        replay(tmp_path / "cut.pickle")
    with pytest.raises(UserError, match="no such file"):
        replay(tmp_path / "none")


def test_the_environment_says_whether_segments_expand(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert not is_expandable() and not Margin().expandable_segments
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128,expandable_segments:True")
    assert is_expandable() and "expandable" in str(Margin())
