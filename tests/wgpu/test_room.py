"""Tensors that share a buffer of the device."""

from types import SimpleNamespace

from qwen3_moe_jax.wgpu_backend.room import ALIGNMENT, Room


def made_of(max_buffer_bytes: int) -> tuple[SimpleNamespace, list[int]]:
    sizes: list[int] = []

    def buffer(nbytes: int, label: str) -> str:
        sizes.append(nbytes)
        return label

    return SimpleNamespace(max_buffer_bytes=max_buffer_bytes, buffer=buffer), sizes


def test_windows_of_a_room_share_its_buffer_and_nothing_else():
    device, sizes = made_of(1 << 30)
    wanted = [113_246_208, 113_246_208, 165_150_720, 20, 5_898_240]
    room = Room(device, sum(wanted), "layers.0.")
    windows = [room.window(n, "own") for n in wanted]
    assert len(sizes) == 1
    assert {w[0] for w in windows} == {"layers.0."}
    assert all(begin % ALIGNMENT == 0 for _, begin, _ in windows)
    assert all(size >= n and size % 16 == 0 for n, (_, _, size) in zip(wanted, windows, strict=True))
    ends = [begin + size for _, begin, size in windows]
    assert all(end <= begin for end, (_, begin, _) in zip(ends, windows[1:], strict=False))
    assert ends[-1] <= sizes[0]


def test_a_room_that_no_buffer_can_hold_or_that_is_full_gives_each_its_own():
    device, sizes = made_of(1 << 20)
    room = Room(device, 1 << 20, "layers.0.")
    assert sizes == []
    assert room.window(1000, "own") == ("own", 0, 1008)
    room = Room(device, 512, "layers.1.")
    assert room.window(512, "own")[0] == "layers.1."
    assert room.window(900 << 10, "own") == ("own", 0, 900 << 10)
