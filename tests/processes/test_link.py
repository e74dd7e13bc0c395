# pytest tests/processes/test_link.py
"""The link between processes: they agree, they refuse by one line, a death ends all. Real processes without jax."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from alst_jax.processes.place import Place
from alst_jax.processes.server import Server
from alst_jax.processes.wire import Connection

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, sys, time
from alst_jax.processes import wire
wire.BEAT, wire.SILENCE = 0.2, 3.0
from alst_jax.processes import link as links, start
from alst_jax.config import TrainConfig, UserError
links.SETTLE = 0.2
rank, port, count, what = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
values = dict(coordinator=f"127.0.0.1:{port}", processes=count, process=rank, start_timeout=6 if what == "short" else 90)
if what == "flags":
    values["seq_len"] = 100 + rank
if what == "versions":
    start.versions = lambda: {"jax": str(rank)}
out = os.fdopen(os.dup(1), "w", buffering=1)  # a process that does not log closes its own
try:
    start.join(TrainConfig(**values))
    link = links.link()
    if what == "agree":
        print(link.exchange("rank", [rank, rank]), link.told("first", lambda: f"from {rank}"),
              link.hosts == (link.host,) * count,
              link.local_ranks, file=out)
        link.same("a value", 7)
        link.finish()
    if what == "directory":
        from alst_jax.processes import files
        files.SEEN_WITHIN = 0.5
        files.check_seen(pathlib.Path(sys.argv[5]) / "run.json")
        files.check_seen(pathlib.Path(sys.argv[5]) / f"run.json{rank or ''}")
    if what == "data":
        link.same("the data", f"hash {rank}")
    if what == "user" and rank == 1:
        raise UserError("--x 1: is wrong")
    if what == "crash" and rank == 1:
        raise ValueError("a mistake")
    if what == "unread" and rank == 0:
        import train
        def fill():
            print("ready", flush=True)
            while True:
                print("more", flush=True)
                time.sleep(0.05)
        sys.exit(train.while_read(fill))
    if what == "hang" and rank == 1:
        from alst_jax.processes.hang import within
        with within("saving step 3", 1.0):
            time.sleep(60)
    if what == "places":
        link.wait(f"place {rank}")
    if what in ("unread", "hang"):
        link.wait("for ever")
    if what in ("sleep", "short", "user", "crash"):
        print("ready", file=out, flush=True)
        link.wait("for ever") if rank == 0 else time.sleep(60)
except UserError as error:
    sys.exit(links.link().failed(f"error: {error}", 2))
except Exception as error:
    links.link().crashed(error)
    raise
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def begin(what, *more, ranks=(0, 1), count=2, port=None):
    port = port or free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(port), str(count), what, *more],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in ranks
    ]


def ends(processes):
    """[(exit code, stdout, stderr)]."""
    found = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found)]


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_all_learn_what_each_has():
    (code, out, err), (other_code, other, other_err) = ends(begin("agree"))
    assert (code, other_code, err, other_err) == (0, 0, "", "")
    assert lines(out)[-1] == lines(other)[-1] == "[[0, 0], [1, 1]] from 0 True [0, 1]"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "flags",
            r"error: --seq-len 101 on process 1 \(.*\), and 100 on process 0 \(.*\): start all processes with the same flags",
        ),
        ("versions", r"error: version of jax: 1 on process 1 .* with the same versions"),
        (
            "data",
            r"error: the data must be the same in all processes, and process 1 \(.*\) has hash 1 where process 0 .* hash 0",
        ),
        ("user", r"error: process 1 \(.*\): --x 1: is wrong"),
    ],
)
def test_a_mistake_is_one_line_of_process_0(what, words):
    (code, _, err), (other_code, _, other) = ends(begin(what))
    assert (code, other_code) == (2, 2)
    assert len(lines(err)) == 1 and re.fullmatch(words, lines(err)[0])
    assert lines(other) == []


def test_a_run_directory_that_one_does_not_see(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (code, _, err), (other_code, _, other) = ends(begin("directory", str(tmp_path)))
    assert (code, other_code) == (2, 2) and not lines(other)
    assert re.fullmatch(
        r"error: process 1 \(.*\) sees another .*/run.json than process 0 \(.*\), or none: the run directory must be "
        r"on storage that all processes share \(--out\)",
        lines(err)[0],
    )


def test_a_crash_is_named_by_all():
    (code, _, err), (other_code, _, other) = ends(begin("crash"))
    assert (code, other_code) == (1, 1)
    assert re.fullmatch(
        r"error: process 1 of 2 \(.*\) ended with ValueError: a mistake; process 0 of 2 ends too. Go on with "
        "--resume",
        lines(err)[-1],
    )
    assert "Traceback" in other and "process 1 of 2" in other


def test_processes_at_different_places_end():
    (code, _, err), (other_code, _, _) = ends(begin("places"))
    assert (code, other_code) == (1, 1) and "process 0 at 'place 0', process 1 at 'place 1'" in err


@pytest.mark.parametrize(
    ("victim", "how", "why"),
    [
        (1, signal.SIGKILL, "ended without a word"),
        (0, signal.SIGKILL, "ended without a word"),
        (1, signal.SIGSTOP, "gives no sign of life"),
    ],
)
def test_a_death_ends_the_other_with_a_line(victim, how, why):
    processes = begin("sleep")
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    os.kill(processes[victim].pid, how)
    other = processes[1 - victim]
    _, err = other.communicate(timeout=30)
    assert time.monotonic() - began < 20 and other.returncode == 1
    assert (
        len(lines(err)) == 1
        and f"process {victim} of 2" in err
        and why in err
        and f"process {1 - victim} of 2 ends too" in err
    )
    processes[victim].kill()
    processes[victim].communicate()


def test_a_part_of_a_run_that_hangs_ends_all():
    """The process that hangs is alive and gives its signs of life: its own limit ends it, and the others name it."""
    (code, _, err), (other_code, _, other) = ends(begin("hang"))
    assert (code, other_code) == (1, 1)
    words = "gives up: saving step 3 has run for 1 s: a collective or a disk that hangs"
    assert re.fullmatch(
        rf"error: process 1 of 2 \(.*\) {words}; process 0 of 2 ends too. Go on with --resume", lines(err)[0]
    )
    assert words in other


def test_nobody_reads_what_process_0_prints():
    """As behind `| head`: the others do not wait for it."""
    first, second = begin("unread")
    assert first.stdout.readline() == "ready\n"
    first.stdout.close()
    assert second.wait(30) == 141 and first.wait(30) == 141
    assert "stopped, since nothing reads standard output of process 0 any more" in first.stderr.read()
    assert not lines(second.stderr.read())
    for stream in (first.stderr, second.stderr, second.stdout):
        stream.close()


def test_a_number_twice_is_refused():
    found = ends(begin("sleep", ranks=(0, 1, 1), count=3))
    assert [code for code, _, _ in found] == [2, 2, 2]
    said = lines("".join(err for _, _, err in found))
    assert any("two processes are number 1 (--process)" in line for line in lines(found[0][2]))
    assert all("two processes are number 1 (--process)" in line for line in said)


@pytest.fixture(scope="module")
def waited():
    """(two of four, one without process 0, seconds): how processes end that wait 6 s for others, all at once."""
    began = time.monotonic()
    two, one = map(ends, [begin("short", ranks=(0, 2), count=4), begin("short", ranks=(1,))])
    return two, one, time.monotonic() - began


def test_who_does_not_come_is_named(waited):
    found, _, seconds = waited
    assert seconds < 30 and [code for code, _, _ in found] == [2, 2]
    assert "processes 1, 3 of 4 did not come within 6 s" in found[0][2] and not lines(found[1][2])


def test_an_address_that_does_not_answer(waited):
    ((code, _, err),) = waited[1]
    assert code == 2 and len(lines(err)) == 1 and "did not answer within 6 s (--start-timeout)" in err


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, second = ends(begin("short", port=port))
    assert first[0] == second[0] == 2
    assert (
        f"process 0 cannot listen on port {port}" in first[2]
        and "what listens there is no process 0 of a run" in second[2]
    )


def test_process_0_outlives_the_others():
    """The last answer to another process may still be on its way when process 0 has its own."""
    place = Place(host="127.0.0.1", port=free_port(), count=2, rank=0, how="flags")
    server = Server(place, 60)
    members = [Connection(socket.create_connection((place.host, place.port))) for _ in range(2)]
    for rank, member in enumerate(members):
        member.send({"kind": "hello", "rank": rank, "count": 2, "host": "here"})
    waiting = threading.Thread(target=server.outlive)
    waiting.start()
    members[0].send({"kind": "bye"})
    waiting.join(0.5)
    assert waiting.is_alive()
    members[1].send({"kind": "bye"})
    waiting.join(30)
    assert not waiting.is_alive()
    for member in members:
        member.close()
