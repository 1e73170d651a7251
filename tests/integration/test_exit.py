"""Python ends with its own status while the real engine is in a pass, whatever way it ends."""

import subprocess
import sys
import time

import pytest

from aligner_middleware import Aligner, ClosedError

LONG = "You silly fool. " + "Rinse the rice, add water and wait until it has gone, then let it rest. " * 120

BEGIN = f"""
import asyncio, gc, os, signal, sys, threading
from aligner_middleware import Aligner, CorrectionTimeoutError
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for programs in the background
question, answer = "How do I cook rice?", {LONG!r}

def give_up(aligner):
    try:
        aligner.correct(question, answer, timeout=0.3)
    except CorrectionTimeoutError:
        print("gave up", flush=True)

aligner = Aligner.load()
"""
WAYS: dict[str, tuple[str, int]] = {
    "the end of the program": ("give_up(aligner)", 0),
    "the end of a with block": ("with aligner: give_up(aligner)", 0),
    "close": ("give_up(aligner); aligner.close()", 0),
    "the garbage collector": ("give_up(aligner); del aligner; gc.collect()", 0),
    "sys.exit": ("give_up(aligner); sys.exit(3)", 3),
    "an error": ("give_up(aligner); raise ValueError", 1),
    "an interrupt": (
        "threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start(); aligner.correct(question, answer)",
        -2,
    ),
    "an interrupt in a with block": (
        "threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "with aligner: aligner.correct(question, answer)",
        -2,
    ),
    "a cancelled task": (
        "try: asyncio.run(asyncio.wait_for(aligner.acorrect(question, answer), 0.3))\nexcept TimeoutError: pass",
        0,
    ),
    "a dropped stream": (
        "async def drop():\n"
        "    stream = aligner.astream(question, answer)\n"
        "    await asyncio.wait([asyncio.ensure_future(anext(stream))], timeout=0.3)\n"
        "asyncio.run(drop())",
        0,
    ),
    "a thread that still waits": (
        "threading.Thread(target=aligner.correct, args=(question, answer), daemon=True).start()\n"
        "threading.Event().wait(0.3)",
        0,
    ),
}


EVERY_WAY = pytest.mark.parametrize(("end", "status"), WAYS.values(), ids=WAYS)


@EVERY_WAY
def test_python_ends_with_its_own_status_in_the_middle_of_a_pass(aligner: Aligner, end: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + end], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr


@pytest.mark.slow
@EVERY_WAY
def test_python_ends_with_its_own_status_every_time(aligner: Aligner, end: str, status: int) -> None:
    for _ in range(10):  # an abort is a race
        test_python_ends_with_its_own_status_in_the_middle_of_a_pass(aligner, end, status)


def test_closing_stops_the_pass_that_is_under_way() -> None:
    aligner = Aligner.load()
    whole = time.process_time()
    aligner.correct("How do I cook rice?", LONG, strength=1.0)
    whole = time.process_time() - whole
    call = aligner._scheduler.submit(aligner._codec.encode("How do I cook rice?", LONG).generation)  # type: ignore[arg-type]
    time.sleep(0.2)
    work = time.process_time()
    aligner.close()
    assert time.process_time() - work < whole / 4
    with pytest.raises(ClosedError):
        call.result(timeout=0)
