"""Ctrl-C and SIGTERM in a training loop and outside of it, in separate processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The children of a shell's job in the background ignore SIGINT.
NOT_IGNORED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
LOOP = """
import hashlib, sys
from rlhfjax import process

def command():
    with process.stop_requests() as requests:
        print("in the loop", flush=True)
        # Like XLA's compiler: minutes in C, in which Python runs no signal handler.
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[1])))
        while not requests:
            pass
        raise requests.error("small stopped at step 3 and was saved")

process.exit_on_sigterm()
process.run(command)
"""
SAVING = "rlhfjax: Ctrl-C: saving after this step; press it again to quit at once\n"
SAVED = (
    "rlhfjax: small stopped at step 3 and was saved; run the same command to resume\n"
)


def start(script: str, *args: str) -> subprocess.Popen:
    """Returns a process that has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", NOT_IGNORED + script, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize(
    "number, code, lines",
    [(signal.SIGTERM, 75, SAVED), (signal.SIGINT, 130, SAVING + SAVED)],
)
def test_the_first_signal_lets_the_loop_save(number, code, lines):
    process = start(LOOP, "1")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == lines
    assert process.returncode == code


def test_a_second_ctrl_c_leaves_at_once_even_while_the_compiler_runs():
    process = start(LOOP, "2e9")  # minutes; OpenSSL takes no more than an int
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == SAVING
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert errors == "rlhfjax: interrupted; run the same command to resume\n"
    assert process.returncode == 130
    assert time.monotonic() - began < 10


def test_outside_of_the_loop_ctrl_c_leaves_at_once_and_says_how_to_resume():
    script = """
import time
from rlhfjax import process
process.exit_on_sigterm()
process.run(lambda: print("reading", flush=True) or time.sleep(300))
"""
    process = start(script)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert errors == "rlhfjax: interrupted; run the same command to resume\n"
    assert process.returncode == 130
