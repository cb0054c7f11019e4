from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horoyolo.elastic.channel import Lines, encode

VALUES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.lists(st.dictionaries(st.text(), VALUES), max_size=5), st.lists(st.integers(0, 200), max_size=8))
def test_messages_arrive_whole_whatever_the_parts_they_come_in(messages, cuts):
    stream = b"".join(encode(message) for message in messages)
    cuts = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    lines = Lines()
    heard = [message for low, high in pairwise(cuts) for message in lines.feed(stream[low:high])]
    assert heard == messages


@pytest.mark.parametrize("line", [b"3\n", b"[]\n", b"{\n", b"hello\n"])
def test_other_lines_are_refused(line):
    with pytest.raises(ValueError):  # noqa: PT011  # json's own, or ours
        Lines().feed(line)
