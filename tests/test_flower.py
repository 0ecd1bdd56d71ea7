"""The Flower app: bad messages, lost places, and real processes that die."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Listener

import numpy as np
import pytest

flwr = pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.app import (  # noqa: E402
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

APP = pathlib.Path(__file__).parent.parent / "examples" / "federated"
sys.path.insert(0, str(APP))

from fedrac import client_app, server_app, simulation, task, trainer  # noqa: E402
from fedrac.__main__ import main  # noqa: E402
from fedrac.wire import Answer, NotOursError, Question, pack, unpack  # noqa: E402

from raclora_jax import federated as fed  # noqa: E402

CLIENTS = 3
SECONDS = 0.5
NODES = [71, 52, 93]  # node ids are no partition ids


@pytest.fixture(scope="module")
def data():
    train, test = task.load("")
    return [
        task.Data(train.images[k::20], train.labels[k::20]) for k in range(CLIENTS)
    ], test


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:  # short enough for a socket
        yield pathlib.Path(name)


@pytest.fixture(scope="module")
def trainers(data, folder):
    """Trainers that serve, as their processes would."""
    running, listeners = [], []
    for client, part in enumerate(data[0]):
        running.append(trainer.Trainer(part, client))
        listeners.append(Listener(str(folder / f"trainer-{client}"), "AF_UNIX"))
        serving = running[-1], listeners[-1]
        threading.Thread(target=trainer.serve, args=serving, daemon=True).start()
    yield running
    for listener in listeners:
        listener.close()


class Grid:
    """A grid whose nodes call the app's client function; faults change their replies."""

    def __init__(self, folder):
        self.folder, self.faults = folder, {}
        self.nodes = dict(zip(NODES, range(CLIENTS), strict=True))
        self.sent, self.replies = 0, []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        self.replies, ids = [], []
        for message in messages:
            self.sent += 1
            ids.append(f"message {self.sent}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            node = message.metadata.dst_node_id
            config = {"trainer": str(self.folder / f"trainer-{self.nodes[node]}")}
            context = Context(TaskIdentity.run_id, node, config, RecordDict(), {})
            reply = client_app.app(message, context)
            fault = self.faults.get(node, lambda reply, message: [reply])
            self.replies += fault(reply, message)
        return ids

    def pull_messages(self, message_ids):
        come, self.replies = self.replies[::-1], []  # in any order
        return come


@pytest.fixture
def grid(folder, trainers, monkeypatch):
    # The identity that SuperLink gives to a server's process.
    for name, value in {"run_id": next(RUNS), "node_id": 1, "task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    monkeypatch.setattr(server_app, "POLL", 0.01)
    return Grid(folder)


RUNS = iter(range(1, 1000))


@pytest.fixture
def server(data):
    return server_app.Server(data[1], seed=3, clients=CLIENTS)


def answered(**changes):
    """A fault: the client's answer with other fields."""

    def fault(reply, message):
        answer = unpack(Answer, reply.content)
        new = {k: v(answer) if callable(v) else v for k, v in changes.items()}
        return [Message(pack(answer._replace(**new)), reply_to=message)]

    return fault


def factors(change):
    """A fault: every factor changed."""
    return answered(factors=lambda a: {p: change(f) for p, f in a.factors.items()})


def records(**changed):
    """A fault: other records."""

    def fault(reply, message):
        kept = dict(reply.content.items()) | changed
        return [Message(RecordDict(kept), reply_to=message)]

    return fault


def failed(code, reason, sender=None):
    """A fault: an error instead; node 1 is the SuperLink, which speaks for the dead."""

    def fault(reply, message):
        error = Message(Error(code, reason), reply_to=message)
        if sender:
            error.metadata.__dict__["_src_node_id"] = sender
        return [error]

    return fault


def misaddressed(name, value):
    def fault(reply, message):
        reply.metadata.__dict__[f"_{name}"] = value
        return [reply]

    return fault


def nested(reply, message):
    text = ArrayRecord({"hidden/kernel": Array(np.array(["x"]))})
    return records(factors=text)(reply, message)


def damaged(change):
    """A fault: other bytes of one array."""

    def fault(reply, message):
        packed = dict(reply.content["factors"])
        name, array = next(iter(packed.items()))
        bytes_ = change(array.data)
        packed[name] = Array(array.dtype, array.shape, array.stype, bytes_)
        return records(factors=ArrayRecord(packed))(reply, message)

    return fault


def archive(data):
    file = io.BytesIO()
    np.savez(file, factor=np.zeros(3))
    return file.getvalue()


FAULTS = {
    "no bytes": (damaged(lambda data: b""), "not ours"),
    "cut bytes": (damaged(lambda data: data[:-7]), "not ours"),
    "a cut header": (damaged(lambda data: data[:40]), "not ours"),
    "a torn header": (damaged(lambda data: data.replace(b"(", b"[", 1)), "not ours"),
    "noise": (damaged(lambda data: data[::-1]), "not ours"),
    "an archive": (damaged(archive), "not ours"),
    "a torn archive": (damaged(lambda data: archive(data)[:50]), "not ours"),
    "complex numbers": (factors(lambda f: f + 1j), "not ours"),
    "finite in float64": (factors(lambda f: np.float64(f) + 1e300), "not finite"),
    "NaN": (factors(lambda f: f * np.nan), "not finite"),
    "infinity": (factors(lambda f: f + np.inf), "not finite"),
    "wrong shape": (factors(lambda f: f[:-1]), "shape"),
    "one factor less": (
        answered(factors=lambda a: dict([*a.factors.items()][1:])),
        "shape",
    ),
    "no factors": (answered(factors={}), "shape"),
    "another link": (answered(link=lambda a: a.link - 1), "round"),
    "another stamp": (answered(stamp="0" * 16), "stamp"),
    "the same twice": (lambda reply, message: [reply, reply], "twice"),
    "negative weight": (answered(count=-5), "weight"),
    "no int32": (answered(count=2**40), "not ours"),
    "client out of range": (answered(client=CLIENTS), "not ours"),
    "another's number": (answered(client=lambda a: (a.client + 1) % 3), "not ours"),
    "text for numbers": (nested, "not ours"),
    "one record more": (records(more=MetricRecord({"x": 1.0})), "not ours"),
    "other fields": (records(said=ConfigRecord({"client": 1})), "not ours"),
    "a field of another type": (
        records(said=ConfigRecord({"client": 1, "link": 1, "count": 2.5, "stamp": ""})),
        "not ours",
    ),
    "an empty message": (
        lambda reply, message: [Message(RecordDict(), reply_to=message)],
        "nothing",
    ),
    "nothing": (lambda reply, message: [], "late"),
    "an expired message": (failed(3, "message unavailable", 1), "late"),
    "a node that died": (failed(5, "node unavailable", 1), "gone"),
    "a client that failed": (failed(2, "ClientApp\nraised"), "failed"),
    "a node not asked": (misaddressed("src_node_id", 999), "unasked"),
    "another message": (misaddressed("reply_to_message_id", "message 1"), "unasked"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_message_is_logged_and_harms_nothing(name, grid, server, data, monkeypatch):
    fault, reason = FAULTS[name]
    seen = []
    aggregate = fed.aggregate

    def watched(strategy, state, messages):
        seen.extend(messages)
        return aggregate(strategy, state, messages)

    logs = [server.run_link(grid, NODES, SECONDS)]
    grid.faults[NODES[1]] = fault
    monkeypatch.setattr(fed, "aggregate", watched)
    logs.append(server.run_link(grid, NODES, SECONDS))
    grid.faults.clear()
    logs.append(server.run_link(grid, NODES, SECONDS))

    others = [0, 1, 2] if name == "the same twice" else [0, 2]
    assert [log.accepted for log in logs] == [[0, 1, 2], others, [0, 1, 2]]
    drops = [drop["reason"] for drop in logs[1].dropped]
    # What was not asked for is no answer to what was.
    expected = [reason, "late"] if reason == "unasked" else [reason]
    assert drops == expected
    assert all("\n" not in drop["line"] for drop in logs[1].dropped)
    if reason in ("not ours", "nothing", "unasked", "late", "gone", "failed"):
        assert [message.client for message in seen[:2]] == [2, 0]
        assert len(seen) == 2 + 3  # two in this link, three in the next
    check_simulation(server, logs, data)


def check_simulation(server, logs, data):
    """The model after every link is what the log and its participants say."""
    accepted = [log.accepted for log in logs]
    simulated = simulation.simulate(data[0], server.seed, accepted)
    start = task.start(server.seed, 64)
    state = fed.init(task.STRATEGY, start, key=server.seed)
    for step, other, log in zip(server.steps, simulated, logs, strict=True):
        state = fed.replay(task.STRATEGY, state, [step])
        assert task.digest(state) == log.model
        assert simulation.difference(state, other) < 1e-6


def test_a_link_without_answers_leaves_the_weights(grid, server):
    before = server.run_link(grid, NODES, SECONDS)
    for node in NODES:
        grid.faults[node] = failed(5, "node unavailable")
    skipped = server.run_link(grid, NODES, SECONDS)
    assert skipped.accepted == []
    assert skipped.bytes_up == 0
    assert skipped.model == before.model
    grid.faults.clear()
    after = server.run_link(grid, NODES, SECONDS)
    assert after.accepted == [0, 1, 2]
    assert after.model != before.model


def test_a_node_gets_the_links_it_missed_and_no_more(grid, server):
    sizes = [server.run_link(grid, NODES, SECONDS).bytes_down for _ in range(2)]
    factor = sizes[1] // CLIENTS
    assert sizes == [0, CLIENTS * factor]
    grid.faults[NODES[0]] = lambda reply, message: []
    server.run_link(grid, NODES, SECONDS)
    grid.faults.clear()
    log = server.run_link(grid, NODES, SECONDS)
    assert log.bytes_down == (CLIENTS + 1) * factor
    assert log.accepted == [0, 1, 2]


def test_a_restarted_node_has_a_new_id_and_the_whole_chain(grid, server, trainers, data):
    logs = [server.run_link(grid, NODES, SECONDS) for _ in range(2)]
    trainers[1]._restart(0, 0)
    grid.nodes = {71: 0, 88: 1, 93: 2}
    logs.append(server.run_link(grid, [71, 88, 93], SECONDS))
    assert logs[-1].accepted == [0, 1, 2]
    check_simulation(server, logs, data)


def test_a_trainer_that_lost_its_place_is_refused_once(grid, server, trainers, data):
    logs = [server.run_link(grid, NODES, SECONDS) for _ in range(3)]
    trainers[1]._restart(0, 0)
    logs.append(server.run_link(grid, NODES, SECONDS))
    (drop,) = logs[-1].dropped
    assert (drop["client"], drop["reason"]) == (1, "refused")
    assert "stands at link 0, the factors begin at link 2" in drop["line"]
    logs.append(server.run_link(grid, NODES, SECONDS))
    assert logs[-1].accepted == [0, 1, 2]
    check_simulation(server, logs, data)


def test_a_client_refuses_another_stamp_and_what_is_no_question(grid, folder):
    question = Question(0, 0, "f" * 16, 0, {})
    contents = [(pack(question), "stamp"), (RecordDict(), "NotOursError")]
    for content, said in contents:
        message = Message(content, dst_node_id=71, message_type="train")
        grid.push_messages([message])
        (reply,) = grid.pull_messages([])
        assert reply.error.code == client_app.REFUSED
        assert said in reply.error.reason


@pytest.mark.parametrize(
    "name", ["kernel", "x/bias", "9/bias", "-1/bias", "0/more", "0/"]
)
def test_a_trainer_refuses_factors_of_no_link_and_goes_on(name, trainers):
    one = trainers[0]
    one._restart(0, 0)
    odd = Question(0, 1, one.stamp, 0, {name: np.zeros(3, np.float32)})
    said = one.answer(odd, run=0)
    assert isinstance(said, str)
    assert ("which is trained" if name == "0/more" else repr(name)) in said
    assert one.link == 0
    assert one.answer(Question(0, 0, one.stamp, 0, {}), run=0).link == 0


def test_a_node_without_a_trainer_says_so(grid, server):
    grid.nodes = {71: 0, 52: 7, 93: 2}
    log = server.run_link(grid, NODES, SECONDS)
    assert log.accepted == [0, 2]
    assert log.dropped[0]["reason"] == "refused"
    assert "FileNotFoundError" in log.dropped[0]["line"]


def test_messages_carry_seed_link_stamp_and_factors_only(grid, server):
    server.run_link(grid, NODES, SECONDS)
    question = server._question(NODES[0])
    assert set(pack(question)["said"]) == {"seed", "link", "stamp", "since"}
    start = {f"0/{path}" for path in server.state.factors}
    assert set(pack(question)["factors"]) == start
    assert unpack(Question, pack(question)).seed == 3
    with pytest.raises(NotOursError, match="expected client, link, count, stamp"):
        unpack(Answer, pack(question))


def test_the_app_writes_a_log_that_replays(grid, tmp_path, data):
    config = {"seed": 4, "links": 3, "nodes": 3, "timeout": SECONDS}
    config |= {"data-dir": "", "out": str(tmp_path)}
    server_app.app(grid, Context(1, 1, {}, RecordDict(), config))
    log, states = simulation.read(tmp_path, 4, 64)
    assert [line["accepted"] for line in log] == [[0, 1, 2]] * 3
    simulated = simulation.simulate(data[0], 4, [[0, 1, 2]] * 3)
    assert simulation.difference(states[-1], simulated[-1]) < 1e-6
    log[1]["model"] = "0" * 16
    text = "".join(json.dumps(line) + "\n" for line in log)
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match="link 1: the factors lead to the weights"):
        simulation.read(tmp_path, 4, 64)


def test_bad_options_are_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["fedrac", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is not empty"):
        main()
    monkeypatch.setattr(sys, "argv", ["fedrac", "--links", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--links and --timeout must be positive" in capsys.readouterr().err


def program(folder, *arguments):
    """Starts the program in a process of its own; its files go to a folder."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(APP), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-m", "fedrac", "--out", str(folder), *arguments],
        env=env | {"TMPDIR": "/tmp", "FEDRAC_TEST": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_over(folder):
    """Processes of a run, wherever they went: their environment names its folder."""
    found, mark = [], f"FEDRAC_TEST={folder}".encode()
    for one in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark in (one / "environ").read_bytes():
                found.append((one / "cmdline").read_bytes())
        except OSError:
            pass
    return found


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.5)
    return condition()


@pytest.mark.slow
def test_a_killed_node_and_a_late_one_leave_the_simulation(tmp_path):
    """Real processes: the program itself compares weights with the simulation."""
    running = program(tmp_path, "--kill", "--late", "--links", "7", "--timeout", "75")
    said, _ = running.communicate(timeout=1500)
    assert running.returncode == 0, said
    log, states = simulation.read(tmp_path, 0, 64)
    train, _ = task.load("")
    parts = [task.part(train, client, CLIENTS) for client in range(CLIENTS)]
    accepted = [line["accepted"] for line in log]
    for state, other in zip(states, simulation.simulate(parts, 0, accepted), strict=True):
        assert simulation.difference(state, other) < 1e-6
    # A busy machine may make more of them late: the log says who and why.
    assert all(1 not in clients for clients in accepted[2:])
    assert 2 not in accepted[5]
    drops = [{drop["client"]: drop["reason"] for drop in line["dropped"]} for line in log]
    assert drops[2][1] in ("gone", "late")
    assert drops[5][2] == "late"
    assert wait_for(lambda: not left_over(tmp_path), 20), left_over(tmp_path)


@pytest.mark.slow
def test_unknown_nodes_are_refused(tmp_path):
    running = program(tmp_path, "--tls", "--links", "2", "--timeout", "75")
    said, _ = running.communicate(timeout=900)
    assert running.returncode == 0, said
    assert "stranger refused" in said
    assert "keyless refused" in said
    log, _ = simulation.read(tmp_path, 0, 64)
    assert all(len(line["asked"]) == CLIENTS for line in log)
    assert all(set(line["accepted"]) <= set(range(CLIENTS)) for line in log)
    assert log[-1]["accepted"]


@pytest.mark.slow
@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_program(what, tmp_path):
    running = program(tmp_path, "--links", "50")
    assert wait_for(lambda: (tmp_path / "log.jsonl").exists(), 300)
    assert len(left_over(tmp_path)) > 2 + 2 * CLIENTS
    running.send_signal(what)
    running.communicate(timeout=120)
    assert wait_for(lambda: not left_over(tmp_path), 60), left_over(tmp_path)
