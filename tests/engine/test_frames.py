"""Frames: what is sent comes out again, however it is cut on its way."""

from __future__ import annotations

import io
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from engine.processes.frames import Frame, Frames, frame, read_frame

FRAMES = st.lists(st.tuples(st.binary(max_size=300), st.lists(st.binary(max_size=300), max_size=3)))


@given(FRAMES, st.integers(1, 700))
def test_pieces_of_any_size_are_the_same_messages(
    sent: list[tuple[bytes, list[bytes]]], size: int
) -> None:
    wire = b"".join(part for head, body in sent for part in frame(head, body))
    frames, came = Frames(), list[Frame]()
    for start in range(0, len(wire), size):
        came += frames.take_in(wire[start : start + size])
    assert came == [(head, b"".join(body)) for head, body in sent]
    assert len(frames) == 0


@given(FRAMES)
def test_a_source_is_read_to_its_end(sent: list[tuple[bytes, list[bytes]]]) -> None:
    source = io.BytesIO(b"".join(part for head, body in sent for part in frame(head, body)))
    for head, body in sent:
        assert read_frame(source) == (head, b"".join(body))
    assert read_frame(source) is None


def test_a_message_that_is_cut_short_is_none() -> None:
    """Its writer was killed in the middle."""
    wire = b"".join(frame(b'{"first":0}', [b"rows"]))
    for cut in range(len(wire)):
        assert read_frame(io.BytesIO(wire[:cut])) is None
        frames = Frames()
        assert list(frames.take_in(wire[:cut])) == []
        assert len(frames) == cut


def test_a_child_keeps_its_pipes_for_messages() -> None:
    """What it or a library prints goes to standard error, and nobody else reads its input."""
    program = (
        "from engine.processes.frames import frame, keep_pipes, read_frame\n"
        "source, out = keep_pipes()\n"
        "print('hello', flush=True)\n"
        "asked = read_frame(source)\n"
        "import sys; assert not sys.stdin.read()\n"
        "out.writelines(frame(asked.head[::-1], [asked.body]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=b"".join(frame(b"abc", [b"body"])),
        capture_output=True,
        check=True,
    )
    assert list(Frames().take_in(done.stdout)) == [(b"cba", b"body")]
    assert done.stderr == b"hello\n"
