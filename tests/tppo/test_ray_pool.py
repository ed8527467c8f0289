"""The pool against a Ray of our own: calls are run in this process, in random order, and workers die at random."""

import random
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from profiling.hosts import Host, HostNames
from tests.tppo.ranks import meeting
from tppo.cluster.packing import chunks_of, drop_weights, layouts_of, unpack
from tppo.cluster.places import Places
from tppo.cluster.pool import EnginePool
from tppo.cluster.sync import ThroughTheObjectStore
from tppo.cluster.worker import About, Advance, EngineSpec, EngineWorker
from tppo.rollout.protocol import Completion, EngineError, Request, Sampling


class Died(Exception):
    """As Ray's ActorDiedError."""


class FakeRay:
    """Objects and calls. A call is made when it is waited for; a few are left undone."""

    def __init__(self, seed, deaths):
        self.random, self.deaths = random.Random(seed), deaths

    def put(self, value):
        return SimpleNamespace(result=lambda: value)

    def get(self, reference, timeout=None):
        return [self.get(one) for one in reference] if isinstance(reference, list) else reference.result()

    def wait(self, references, num_returns=1, timeout=None):
        done = [r for r in references if getattr(r, "done", False)]
        left = [r for r in references if r not in done]
        self.random.shuffle(left)
        wanted = num_returns if timeout != 0 else 0
        for reference in left[: max(0, wanted - len(done))]:
            reference.done = True
            done.append(reference)
        return done, [r for r in references if r not in done]

    def kill(self, actor):
        actor.worker.dead = True


class FakeActor:
    def __init__(self, ray, worker):
        self.ray, self.worker = ray, worker

    def __getattr__(self, name):
        def remote(*arguments):
            known = []

            def result():
                if not known:
                    known.append(self._call(name, arguments))
                if isinstance(known[0], Exception):
                    raise known[0]
                return known[0]

            return SimpleNamespace(result=result)

        method = SimpleNamespace(remote=remote)
        method.options = lambda **_: method
        return method

    def _call(self, name, arguments):
        worker = self.worker
        if not worker.dead and worker.mortal and self.ray.deaths and self.ray.random.random() < 0.25:
            self.ray.deaths -= 1
            worker.dead = True
        if worker.dead:
            return Died("the actor died")
        return getattr(worker, name)(*arguments)


class FakeWorker:
    """Row r ends after its budget, with the tokens r, r + 1, ...; every call ends one or two rows."""

    def __init__(self, ray):
        self.random, self.rows, self.dead, self.mortal, self.version = ray.random, {}, False, False, None

    def build(self, spec):
        return None

    def about(self):
        return About(Host("another boot", "far"), "node", 1, [])

    def now(self):
        return 0.0

    def ping(self):
        return 0.0

    def interrupt(self, call):
        return None

    def receive(self, layout, numbers):
        return None

    def use_weights(self, version):
        self.version = version

    def advance(self, call, requests, sampling):
        self.rows |= {request.row: request for request in requests}
        ended = self.random.sample(sorted(self.rows), min(len(self.rows), self.random.randint(0, 2)))
        return Advance([self._ended(self.rows.pop(row), "budget") for row in ended], [])

    def abort(self):
        rows, self.rows = self.rows, {}
        return Advance([self._ended(request, "aborted") for request in rows.values()], [])

    def _ended(self, request, reason):
        tokens = list(range(request.row, request.row + request.budget_tokens))
        tokens = tokens[: self.random.randint(0, len(tokens))] if reason == "aborted" else tokens
        return Completion(request.row, tokens, [0.0] * len(tokens), reason, self.version, 0.0, 1.0)


class FakePlaces(Places):
    def actor(self, cls, bundle, **options):
        return FakeActor(self.ray, FakeWorker(self.ray))


def pool_of(make_config, seed, *, engines=3, deaths=0, retries=2, dispatch="round_robin"):
    ray = FakeRay(seed, deaths)
    own = {"address": "auto", "engines": engines, "retries": retries, "dispatch": dispatch}
    spec = EngineSpec(make_config("fake", ray=own), "", slots=4, max_tokens=90, threads=1)
    store = ThroughTheObjectStore(ray, torch.nn.Linear(2, 2), torch.float32, timeout_s=1.0)
    pool = EnginePool(FakePlaces(ray, None, [], engines, 0), spec, store, store, generator=torch.Generator())
    notes = []
    pool.attach(0.0, notes.append, HostNames([Host("ours", "near")]))
    return pool, ray, notes


def make_mortal(pool):
    for member in pool._members:
        member.actor.worker.mortal = True


@pytest.mark.parametrize("dispatch", ["round_robin", "shared_queue"])
@pytest.mark.parametrize("aborts", [False, True])
def test_rows_in_are_rows_out_whichever_workers_die(make_config, capsys, dispatch, aborts):
    """Every row comes back once, whole if it ended; or the pool says that no engine is left."""
    gave_up = 0
    for seed in range(300):
        draw = random.Random(seed)
        pool, _, notes = pool_of(
            make_config, seed, engines=draw.randint(1, 4), deaths=draw.randint(0, 4), retries=draw.randint(0, 3),
            dispatch=dispatch,
        )  # fmt: skip
        rows = draw.randint(1, 30)
        try:
            for version in range(3):
                pool.update_weights(version)
                make_mortal(pool)
                requests = [Request(row, [1], 0, 3) for row in range(rows)]
                pool.submit(requests, Sampling(seed=0, by_row=True))
                done = []
                while ended := pool.run_until_a_row_ends():
                    done += ended
                    if aborts and len(done) >= rows // 2:
                        done += pool.abort()
                assert sorted(completion.row for completion in done) == list(range(rows)), seed
                for completion in done:
                    whole = [completion.row, completion.row + 1, completion.row + 2]
                    assert completion.token_ids == whole[: len(completion.token_ids)]
                    assert completion.token_ids == whole or completion.reason == "aborted"
                    assert completion.policy_version == version or completion.engine is None
        except EngineError as error:
            assert "no rollout engine on the cluster is left" in str(error)
            gave_up += 1
        assert all("failed: Died: the actor died" in note["text"] for note in notes if "rows" in note)
    assert 0 < gave_up < 150


def test_round_robin_gives_row_i_to_engine_i_mod_n(make_config):
    pool, *_ = pool_of(make_config, 0)
    pool.submit([Request(row, [1], 0, 3) for row in range(8)], Sampling(seed=0))
    assert [sorted(member.rows) for member in pool._members] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_shared_queue_fills_slots_in_order_and_then_those_that_fall_free(make_config):
    pool, *_ = pool_of(make_config, 0, engines=2, dispatch="shared_queue")
    pool.submit([Request(row, [1], 0, 3) for row in range(12)], Sampling(seed=0))
    ended = pool.run_until_a_row_ends()
    assert all(done.row < 8 for done in ended)  # two engines of four slots
    pool._fill_free_slots()
    assert max(len(member.rows) for member in pool._members) == 4
    assert len(pool._shared) == 4 - len(ended)


def test_a_clock_of_another_host_is_noted_with_its_offset(make_config):
    _, _, notes = pool_of(make_config, 0)
    assert [note["engine"] for note in notes] == [0, 1, 2]
    assert all("is on another host" in note["text"] and note["offset_s"] > 0 for note in notes)  # theirs stands at 0


def test_what_failed_is_said_in_one_line(make_config, capsys):
    pool, _, notes = pool_of(make_config, 3, engines=2, deaths=1, retries=1)
    make_mortal(pool)
    while len(notes) == 2:
        pool.submit([Request(row, [1], 0, 3) for row in range(6)], Sampling(seed=0))
        while pool.run_until_a_row_ends():
            pass
    said = capsys.readouterr().err.strip()
    assert said.startswith("tppo: engine ")
    assert "failed: Died: the actor died; another one starts in its place (1 of 1); its " in said
    assert said.count("\n") == 0


def test_an_engine_makes_process_groups_of_its_own_whatever_torchrun_told_who_started_it(monkeypatch):
    with meeting(2) as (first, _):
        for name, value in first.items():
            monkeypatch.setenv(name, value)
        EngineWorker()
        with socket.socket() as listening:  # nobody answers there: a client of torchrun's store would wait
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        (store, rank, world) = next(iter(dist.rendezvous(f"tcp://127.0.0.1:{port}?rank=0&world_size=1")))
    assert (store.port, rank, world) == (port, 0, 1)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10_000_000])
def test_chunks_bring_a_model_over_in_the_type_that_is_sent(chunk_bytes):
    model, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    layouts = layouts_of(model, torch.float32, chunk_bytes)
    assert len(layouts) == {1: 2, 100: 1, 10_000_000: 1}[chunk_bytes]  # 60 and 20 bytes
    for layout, flat in chunks_of(model, layouts, "cpu"):
        unpack(other, layout, flat, keep=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    half = [flat.dtype for _, flat in chunks_of(model, layouts_of(model, torch.bfloat16), "cpu")]
    assert half == [torch.bfloat16]


def test_kept_chunks_are_the_weights_themselves_until_they_are_dropped():
    model, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    ((layout, flat),) = chunks_of(model, layouts_of(model, torch.float32), "cpu")
    unpack(other, layout, flat, keep=True)
    assert other.weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert torch.equal(other.weight, model.weight)
    drop_weights(other)
    assert other.weight.numel() == 0


def test_tied_weights_are_sent_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert [piece.name for layout in layouts_of(model, torch.float32) for piece in layout.pieces] == ["0.weight"]
