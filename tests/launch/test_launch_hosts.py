from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horoyolo.config import InputError
from horoyolo.launch.hosts import (
    Host,
    bracketed,
    expand_counts,
    expand_nodelist,
    parse_host_list,
    parse_hostfile,
    read_hostfile,
    render_host_list,
    slurm_hosts,
    take_slots,
)

HOSTFILES = Path(__file__).parents[2] / "hostfiles"

names = st.one_of(
    st.from_regex(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,5}[.]?[a-zA-Z0-9_]){0,4}", fullmatch=True),
    st.from_regex(r"(n|gpu-|r1c)[0-9]{1,4}", fullmatch=True),
    st.ip_addresses(v=4).map(str),
)
any_names = st.one_of(names, st.ip_addresses(v=6).map(str))
slots = st.integers(1, 64)


@st.composite
def whole_hosts(draw):
    host = Host(draw(any_names), draw(slots))
    room = draw(st.none() | st.integers(0, 8))
    return replace(host, max_slots=None if room is None else host.slots + room, port=draw(st.none() | st.integers(1, 65535)))


def lists_of(hosts):
    return st.lists(hosts, min_size=1, max_size=12, unique_by=lambda host: host.name.lower())


plain = lists_of(st.builds(Host, any_names, slots))
named = lists_of(st.builds(Host, names, slots))


@settings(max_examples=60, deadline=None)
@given(lists_of(whole_hosts()))
def test_an_open_mpi_file_keeps_everything(hosts):
    keywords = [{"slots": host.slots, "max_slots": host.max_slots, "port": host.port} for host in hosts]
    words = [[f"{name}={value}" for name, value in given.items() if value is not None] for given in keywords]
    assert parse_hostfile("".join(f"{host.name} {' '.join(given)}\n" for host, given in zip(hosts, words, strict=True))) == hosts


@settings(max_examples=60, deadline=None)
@given(plain)
def test_mpich_and_pbs_files_and_lists_keep_names_slots_and_order(hosts):
    assert parse_hostfile("".join(f"{bracketed(host.name)}:{host.slots}\n" for host in hosts)) == hosts
    assert parse_hostfile("".join(f"{bracketed(host.name)}\n" * host.slots for host in hosts)) == hosts
    assert parse_host_list(render_host_list(hosts)) == hosts


@settings(max_examples=60, deadline=None)
@given(named)
def test_an_allocation_of_slurm_keeps_names_slots_and_order(hosts):
    nodes, tasks = ",".join(host.name for host in hosts), ",".join(str(host.slots) for host in hosts)
    assert slurm_hosts({"SLURM_JOB_NODELIST": nodes, "SLURM_TASKS_PER_NODE": tasks}) == hosts


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["n", "gpu-", "r1c"]), st.integers(0, 999), st.integers(0, 30), st.integers(1, 5))
def test_a_range_names_its_nodes(prefix, low, more, digits):
    numbers = [f"{number:0{digits}d}" for number in range(low, low + more + 1)]
    for text in (f"{prefix}[{numbers[0]}-{numbers[-1]}]", f"{prefix}[{','.join(numbers)}]"):
        assert expand_nodelist(text) == [f"{prefix}{number}" for number in numbers]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_list_of_hosts_or_bad_input(text):
    for parse in (parse_hostfile, parse_host_list, expand_nodelist, expand_counts):
        try:
            assert parse(text)
        except InputError as error:
            messages = str(error).splitlines()
            assert len(messages) == 1


@settings(max_examples=60, deadline=None)
@given(plain, st.integers(1, 200))
def test_workers_fill_one_host_after_the_other(hosts, num_workers):
    if num_workers > sum(host.slots for host in hosts):
        with pytest.raises(InputError, match=rf"{num_workers} workers .* but {sum(host.slots for host in hosts)} slots on {len(hosts)} hosts"):
            take_slots(hosts, num_workers)
        return
    taken = take_slots(hosts, num_workers)
    assert sum(host.slots for host in taken) == num_workers
    assert [host.name for host in taken] == [host.name for host in hosts[: len(taken)]]
    assert [host.slots for host in taken[:-1]] == [host.slots for host in hosts[: len(taken) - 1]]
    assert take_slots(taken, num_workers) == taken


def test_the_forms_of_a_hostfile():
    text = "# all of them\n\n  a slots = 4  max-slots=8 # why\r\nb:2\nc\nd slots=1 port=2222\nc\nfe80::1 slots=2\n[fe80::2]:3\n[::3] slots=1\n"
    assert parse_hostfile(text) == [
        Host("a", 4, max_slots=8),
        Host("b", 2),
        Host("c", 2),
        Host("d", 1, port=2222),
        Host("fe80::1", 2),
        Host("fe80::2", 3),
        Host("::3", 1),
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a slots=4\n\na slots=4\n", "line 3", r"host a is there already \(F, line 1\)"),
        ("a\nA:3", "line 2", r"host A is there already \(F, line 1\)"),
        ("a:1\na:1", "line 2", "there already"),
        ("# c\na slots=0", "line 2", "'a slots=0': 0 slots; at least 1 is wanted; HOST, HOST slots=N"),
        ("a:0", "line 1", "0 slots"),
        ("a slots=4 max_slots=2", "line 1", "max_slots=2 is less than its 4 slots"),
        ("a slots=four", "line 1", "'slots=four': a whole number is wanted"),
        ("a slots=-1", "line 1", "a whole number is wanted"),
        ("a slots=1 slots=2", "line 1", "'slots=2' is not understood"),
        ("a:1 slots=2", "line 1", "slots are given twice"),
        ("a b", "line 1", "'b' is not understood"),
        ("a slots=1 user=x", "line 1", "'user=x' is not understood"),
        ("a port=0", "line 1", "port=0; 1 to 65535"),
        ("slots=4", "line 1", "'slots=4' is no host name"),
        ("a:", "line 1", "a whole number is wanted"),
        ("fe80::1", "line 1", r"with an IPv6 address as \[ADDRESS\]:N"),
        ("[fe80::g]:1", "line 1", "is no host name"),
        ("-oProxyCommand=x:1", "line 1", "is no host name"),
        ("a$(reboot):1", "line 1", "is no host name"),
        ("root@a:1", "line 1", "is no host name"),
        ("ä:1", "line 1", "is no host name"),
        ("", "F", "no host in it"),
        ("# nothing\n\n", "F", "no host in it"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_file_line_and_what_is_legal(text, where, what):
    with pytest.raises(InputError, match=what) as caught:
        parse_hostfile(text, "F")
    assert str(caught.value).startswith("F")
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a:4,,b:4", "a:4,a:4", "a:x", "a b:4", "a:4;b:4", "::1", "a slots=4"])
def test_a_wrong_list_is_refused(text):
    with pytest.raises(InputError, match=r"--hosts, entry \d"):
        parse_host_list(text)


NO_NAMES = ("", "-a", ".a", "a b", "a\n", "a'", 'a"', "$a", "a`", "a;b", "a|b", "a&", "a\\", "*", "a=b", "[a]", "a/b", "a\0", "a" * 254)
UNKNOWABLE = ("a..b", "a" * 64, f"b.{'a' * 64}.c")  # no name server can be asked for these
NO_NODES = ("", "n[", "n[1-", "n]", "n[3-1]", "n[]", "n[1],", "a,,b", "n[1-2]]", "n[[1]]", "-[1-2]", "n[a-b]", "n[1-2", "a b", "$(x)")


@pytest.mark.parametrize("name", NO_NAMES + UNKNOWABLE)
def test_no_host_has_a_name_that_means_something_to_a_shell_or_nothing_to_anybody(name):
    with pytest.raises(InputError, match="is no host name"):
        Host(name, 1)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n[001-003,7],gpu-a", ["n001", "n002", "n003", "n7", "gpu-a"]),
        ("r[1-2]n[09-10]x", ["r1n09x", "r1n10x", "r2n09x", "r2n10x"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("a,b-1,c", ["a", "b-1", "c"]),
    ],
)
def test_compressed_node_lists(text, nodes):
    assert expand_nodelist(text) == nodes


@pytest.mark.parametrize("text", NO_NODES)
def test_a_wrong_node_list_is_refused(text):
    with pytest.raises(InputError, match="node list="):
        expand_nodelist(text)


@pytest.mark.parametrize("text", ["n[0-99999999999999999]", "n[1-65537]", "a[1-300]b[1-300]"])
def test_a_slip_in_a_range_does_not_fill_the_memory(text):
    with pytest.raises(InputError, match="more than 65536 nodes"):
        expand_nodelist(text)


def test_slots_of_an_allocation():
    nodes = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4(x2),2"}
    assert slurm_hosts(nodes) == [Host("n1", 4), Host("n2", 4), Host("n3", 2)]
    assert slurm_hosts({**nodes, "SLURM_NTASKS_PER_NODE": "8"}) == [Host("n1", 8), Host("n2", 8), Host("n3", 8)]
    at_most = {**nodes, "SLURM_NTASKS_PER_NODE": "4"}  # salloc -N3 -n10 --ntasks-per-node=4: ten tasks, no more than four a node
    assert slurm_hosts({**at_most, "SLURM_NTASKS": "10"}) == [Host("n1", 4), Host("n2", 4), Host("n3", 2)]
    assert slurm_hosts({**at_most, "SLURM_NTASKS": "12"}) == [Host("n1", 4), Host("n2", 4), Host("n3", 4)]
    with pytest.raises(InputError, match=r"SLURM_TASKS_PER_NODE='4\(x2\)' is for 2 nodes but SLURM_JOB_NODELIST='n\[1-3\]' names 3"):
        slurm_hosts({**nodes, "SLURM_TASKS_PER_NODE": "4(x2)"})
    with pytest.raises(InputError, match=r"no SLURM_JOB_NODELIST .* inside an allocation"):
        slurm_hosts({})


@pytest.mark.parametrize("text", ["", "4(x0),", "0", "4(2)", "x", "4(x99999)", "-1", "4,"])
def test_wrong_counts_are_refused(text):
    with pytest.raises(InputError, match="N or N\\(xREPEATED\\)"):
        expand_counts(text)


def test_a_file_that_is_not_there_or_no_text_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"hosts.txt' can't be read: No such file"):
        read_hostfile(tmp_path / "hosts.txt")
    with pytest.raises(InputError, match="Is a directory"):
        read_hostfile(tmp_path)
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="not text"):
        read_hostfile(tmp_path / "picture")


def test_windows_files_are_read(tmp_path):
    (tmp_path / "hosts.txt").write_bytes(b"\xef\xbb\xbfa slots=2\r\nb slots=1\r\n")
    assert read_hostfile(tmp_path / "hosts.txt") == [Host("a", 2), Host("b", 1)]


EXAMPLES = {
    "one-box": [Host("localhost", 8)],
    "four-boxes": [Host(f"gpu{number}", 4) for number in (1, 2, 3, 4)],
    "mixed-boxes": [Host("big1", 8, max_slots=8), Host("big2", 8, max_slots=8), Host("small1", 2)],
    "lab": [Host("node1", 1), Host("node2", 1), Host("node3", 1)],
    "mpich": [Host("gpu1", 4), Host("gpu2", 4), Host("10.0.0.13", 2)],
    "pbs": [Host("gpu1", 2), Host("gpu2", 2)],
}


def test_every_example_is_tested():
    assert {path.stem for path in HOSTFILES.iterdir()} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_mean_what_they_say(name):
    assert read_hostfile(HOSTFILES / f"{name}.txt") == EXAMPLES[name]
