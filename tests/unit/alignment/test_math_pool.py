"""Claims that are meant to hang or break the verifier, and what becomes of its processes."""

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.verify import Claim, Verdict, Verifier

SECONDS = 0.4
WAIT_SECONDS = 60.0  # for a process to go, on a machine that may be busy

MATRIX = r"\begin{pmatrix}" + r"\\".join("&".join("1" * 100) for _ in range(100)) + r"\end{pmatrix}"
POISON = {
    "tower": ("9^{9^{9}}", "5"),
    "power": ("10^{10^{8}}", "5"),
    "memory": ("10^{10^{10}}", "5"),
    "factorial": ("10000000!", "5"),
    "smaller factorial": ("1000000!", "5"),
    "small factorial": ("100000!", "5"),
    "sum": (r"\sum_{n=1}^{100000000} n!", "5"),
    "binomial": (r"\binom{10000000}{5000000}", "5"),
    "expansion": ("(1+x)^{1000}", "(x+1)^{999}"),
    "fractions": (r"\frac{1}{" * 2000 + "2" + "}" * 2000, "5"),
    "fewer fractions": (r"\frac{1}{" * 500 + "2" + "}" * 500, "5"),
    "roots": (r"\sqrt{" * 2000 + "2" + "}" * 2000, "5"),
    "fewer roots": (r"\sqrt{" * 500 + "2" + "}" * 500, "5"),
    "boxes": (r"\boxed{" * 200_000, "5"),
    "parentheses": ("(" * 100_000, "5"),
    "fewer parentheses": ("(" * 9_000, "5"),
    "braces": ("}" * 100_000 + "{" * 100_000, "5"),
    "digits": ("7" * 1_000_000, "5"),
    "digits in both": ("7" * 60_001, "7" * 60_000),
    "long sum": ("1+" * 100_000 + "x", "x+1"),
    "shorter sum": ("1+" * 4_000 + "x", "x+1"),
    "set": (r"\{" + ",".join(map(str, range(1000))) + r"\}", r"\{1,2\}"),
    "matrix": (MATRIX, MATRIX.replace(r"1\end", r"2\end")),
    "control characters": ("\x00\x07\u2028\ud7ff\n6\r\n", "5"),
    "null bytes": ("\x00" * 5_000, "5"),
    "right to left": ("\u202e" * 100_000 + "6", "5"),
    "surrogates": ("\ud800x+\udfff", "5"),
    "poisoned gold": ("5", "9^{9^{9}}"),
    "broken gold": ("5", r"\frac{1"),
}
GOOD = [
    (Claim(r"\boxed{\sqrt{16}}", "4"), Verdict.CORRECT),
    (Claim(r"\boxed{\sqrt{17}}", "4"), Verdict.WRONG),
    (Claim(r"\boxed{x^2+2x+1}", "(x+1)^2"), Verdict.CORRECT),
    (Claim(r"\boxed{\{1,2\}}", r"\{2,1\}"), Verdict.CORRECT),
    (Claim(r"\boxed{\frac{2}{6}\pi}", r"\frac{\pi}{3}"), Verdict.CORRECT),
    (Claim("#### 3,250", "3250"), Verdict.CORRECT),
    (Claim("#### 3,251", "3250"), Verdict.WRONG),
    (Claim("no idea", "3250"), Verdict.NO_ANSWER),
    (Claim("#### 5", ""), Verdict.BAD_GOLD),
    (Claim(r"\boxed{\sqrt{4}}", "B", options=("1", "2")), Verdict.CORRECT),
]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, seconds=20.0) as patient:
        yield patient


@pytest.fixture(scope="module")
def hasty() -> Iterator[Verifier]:
    with Verifier(workers=2, seconds=SECONDS, memory_bytes=1 << 28) as verifier:
        yield verifier


def processes(verifier: Verifier) -> list[int]:
    return [seat._process.pid for seat in verifier._pool._seats if seat._process is not None]


def alive(pid: int) -> bool:
    """A zombie is not: nobody may have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(("answer", "gold"), POISON.values(), ids=POISON.keys())
def test_poison_has_a_verdict_that_gives_no_reward(hasty, answer, gold):
    verdict = hasty.verify(Claim(rf"\boxed{{{answer}}}", gold))
    assert verdict is not Verdict.CORRECT
    assert verdict is not Verdict.NO_ANSWER or (answer, gold) in (POISON["boxes"], POISON["braces"])
    assert verdict is not Verdict.BAD_GOLD or (answer, gold) in (POISON["broken gold"], POISON["digits in both"])


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("boxes", Verdict.NO_ANSWER),
        ("braces", Verdict.NO_ANSWER),
        ("broken gold", Verdict.BAD_GOLD),
        ("digits in both", Verdict.BAD_GOLD),
    ],
)
def test_poison_is_called_what_it_is_where_there_is_time(verifier, name, verdict):
    answer, gold = POISON[name]
    assert verifier.verify(Claim(rf"\boxed{{{answer}}}", gold)) is verdict


def test_good_rows_among_poison_have_the_verdicts_they_have_alone():
    rows = [*GOOD, *[(Claim(rf"\boxed{{{answer}}}", gold), None) for answer, gold in POISON.values()]]
    random.Random(0).shuffle(rows)
    # Enough time for the good ones, however cold the process; the poison takes longer in each of its guises.
    with Verifier(workers=2, seconds=1.5, memory_bytes=1 << 28) as verifier:
        alone = {claim: verifier.verify(claim) for claim, _ in GOOD}
        assert alone == dict(GOOD)
        found = verifier.verify_many([claim for claim, _ in rows])
        pids = processes(verifier)
    assert [(claim, verdict) for (claim, known), verdict in zip(rows, found, strict=True) if known] == [
        (claim, known) for claim, known in rows if known
    ]
    assert pids
    assert all_gone(pids)


def test_order_is_kept_over_many_batches(verifier):
    claims = [Claim(rf"\boxed{{{n}+{n % 7}}}", str(n + n % 5)) for n in range(1000)]
    expected = [Verdict.CORRECT if n % 7 == n % 5 else Verdict.WRONG for n in range(1000)]
    assert verifier.verify_many(claims) == expected
    assert len(processes(verifier)) == 2


def test_a_worker_that_is_killed_from_outside_costs_no_verdict(verifier):
    for status in (signal.SIGKILL, signal.SIGTERM):
        verifier.verify_many([Claim(rf"\boxed{{\sqrt{{{n * n}}}}}", str(n)) for n in range(8)])
        for pid in processes(verifier):
            os.kill(pid, status)
        assert verifier.verify(Claim(r"\boxed{\sqrt{36}}", "6")) is Verdict.CORRECT


def test_a_worker_that_goes_silent_is_given_up(monkeypatch):
    monkeypatch.setattr("alignment.math_pool.PATIENCE_SECONDS", 1.0)
    with Verifier(workers=1, seconds=2.0) as verifier:  # the first answer of a cold worker may take half of one
        assert verifier.verify(Claim(r"\boxed{\sqrt{36}}", "6")) is Verdict.CORRECT
        (pid,) = processes(verifier)
        os.kill(pid, signal.SIGSTOP)
        assert verifier.verify(Claim(r"\boxed{\sqrt{25}}", "5")) is Verdict.TIMEOUT
        assert all_gone([pid])
        verifier._pool._arguments = (20.0, 1 << 30)
        assert verifier.verify(Claim("#### 5", "5")) is Verdict.CORRECT


def test_a_worker_that_cannot_start_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr("alignment.math_pool.sys.executable", "/bin/false")
    with Verifier(workers=1) as verifier, pytest.raises(RuntimeError, match="did not start"):
        verifier.verify(Claim(r"\boxed{\sqrt{36}}", "6"))


def test_an_interrupted_call_leaves_the_verifier_usable(monkeypatch):
    with Verifier(workers=2, seconds=20.0) as verifier:
        with monkeypatch.context() as broken:
            broken.setattr("alignment.math_pool._Worker.read", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                verifier.verify_many([claim for claim, _ in GOOD])
        assert processes(verifier) == []
        assert verifier.verify_many([claim for claim, _ in GOOD]) == [verdict for _, verdict in GOOD]


def test_threads_and_event_loops_have_the_same_verdicts(verifier):
    claims, expected = zip(*GOOD, strict=True)
    found: list[list[Verdict]] = []
    threads = [threading.Thread(target=lambda: found.append(verifier.verify_many(claims))) for _ in range(4)]
    for thread in threads:
        thread.start()

    async def in_a_loop() -> list[list[Verdict]]:
        return [
            verifier.verify_many(claims),
            *await asyncio.gather(*[asyncio.to_thread(verifier.verify_many, claims)] * 2),
        ]

    found += asyncio.run(in_a_loop())
    for thread in threads:
        thread.join()
    assert found == [list(expected)] * 7


FORKS = """
import multiprocessing, os, sys, threading
from alignment.verify import Claim, Verifier

claims = [Claim(rf"\\boxed{{\\sqrt{{{n * n}}}}}", str(n + n % 2)) for n in range(20)]
verifier = Verifier(workers=2, seconds=20.0)

def verdicts(_=None):
    return verifier.verify_many(claims)

expected = verdicts()
pids = {seat._process.pid for seat in verifier._pool._seats}
busy = threading.Thread(target=lambda: [verdicts() for _ in range(20)])
busy.start()  # the fork falls into the middle of another thread's call
child = os.fork()
if child == 0:
    same = verdicts() == expected
    own = {seat._process.pid for seat in verifier._pool._seats}
    os._exit(0 if same and not own & pids else 1)
assert os.waitpid(child, 0)[1] == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(verdicts, range(4)) == [expected] * 4
busy.join()
assert verdicts() == expected
assert {seat._process.pid for seat in verifier._pool._seats} == pids
"""


def python(script: str) -> list[str]:
    return [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]


def test_forked_processes_have_workers_of_their_own():
    done = subprocess.run(python(FORKS), capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")


ENDS = r"""
import gc, os, signal, sys, threading, time
from alignment.verify import Claim, Verifier

verifier = Verifier(workers=2, seconds=2.0)
verifier.verify_many([Claim(rf"\boxed{{\sqrt{{{n * n}}}}}", str(n)) for n in range(8)])
pids = [seat._process.pid for seat in verifier._pool._seats]
print(*pids, flush=True)
match sys.argv[1]:
    case "collected":
        del verifier
        gc.collect()
        time.sleep(600)
    case "idle":
        if os.fork() == 0:  # a child that holds no end of a pipe
            time.sleep(600)
        time.sleep(600)
    case "computing":
        poison = [Claim(rf"\boxed{{9^{{9^{{{n}}}}}}}", "5") for n in range(9, 90)]
        threading.Thread(target=lambda: verifier.verify_many(poison), daemon=True).start()
        time.sleep(600)
"""


@pytest.mark.parametrize("how", ["exit", "collected", "idle", "computing"])
def test_no_process_outlives_its_verifier(how):
    """`exit` ends by itself without close(); the others are killed, the first only when its workers have gone."""
    parent = subprocess.Popen([*python(ENDS), how], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if how in ("idle", "computing"):
            time.sleep(0.5)
            parent.kill()
        assert all_gone(pids)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


MEMORY = r"""
from alignment import math_worker
from alignment.verify import Question

math_worker._limit_memory(64 << 20)
math_worker.answer_question = lambda _: bytearray(128 << 20)
print(math_worker.Judge(5.0).verdict(Question("y", "x")))
"""


def test_memory_is_bounded(hasty):
    done = subprocess.run(python(MEMORY), capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("error\n", "")
    hasty.verify(Claim(r"\boxed{\sqrt{16}}", "4"))
    for pid in processes(hasty):
        limit, _ = resource.prlimit(pid, resource.RLIMIT_AS)
        assert 1 << 28 < limit < (1 << 28) + (1 << 30)


LATEX = st.recursive(
    st.sampled_from(["x", "1", "12.5", r"\pi", "n", "", "i", r"\infty", r"\text{cm}", "%", "="]),
    lambda inner: st.one_of(
        st.builds(r"\frac{{{}}}{{{}}}".format, inner, inner),
        st.builds(r"\sqrt{{{}}}".format, inner),
        st.builds("{}^{{{}}}".format, inner, inner),
        st.builds("({},{}]".format, inner, inner),
        st.builds(r"\{{{},{}\}}".format, inner, inner),
        st.builds(r"\begin{{pmatrix}}{}&{}\end{{pmatrix}}".format, inner, inner),
        st.builds(r"{}+{}!".format, inner, inner),
        st.builds(r"\log_{{{}}} {}".format, inner, inner),
        st.builds(r"{}<{}".format, inner, inner),
    ),
    max_leaves=6,
)
ANY = st.one_of(st.text(max_size=60), LATEX, st.binary(max_size=40).map(lambda b: b.decode("latin-1")))


def test_any_claim_has_a_verdict(hasty):
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.builds(Claim, ANY.map(r"\boxed{{{}}}".format) | ANY, ANY), min_size=8, max_size=8))
    def holds(claims):
        found = hasty.verify_many(claims)
        assert all(isinstance(verdict, Verdict) for verdict in found)

    holds()
