"""SIGTERM and SIGINT: at once outside training loops, at the next step inside, never lost; twice
ends the process."""

import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from rlbf_jax.training.preemption import EXIT_CODE, interruptible, stop_on_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def handlers():
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return [signal.getsignal(number) for number in SIGNALS], descriptor


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_a_loop_a_signal_interrupts_and_handlers_come_back(number):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), interruptible("unused"):
        signal.raise_signal(number)
        pytest.fail("went on after the signal")
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_in_a_loop_a_signal_sets_the_flag_and_a_second_ctrl_c_interrupts(number):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop.set
        signal.raise_signal(number)
        assert stop.set
        signal.raise_signal(signal.SIGTERM)  # a manager that repeats itself is no hurry
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second signal")
    assert handlers() == before


def test_a_signal_that_the_loop_did_not_act_on_is_delivered_after_it():
    after = []
    with pytest.raises(KeyboardInterrupt), interruptible("unused"):
        with stop_on_signals():
            signal.raise_signal(signal.SIGTERM)
        after.append("not reached")
    assert after == []


def child(body):
    """A process in `interruptible`, and its output up to the first line."""
    program = """
    import ctypes, sys, time
    from rlbf_jax.training import preemption
    from rlbf_jax.training.preemption import interruptible, stop_on_signals
    """
    source = textwrap.dedent(program) + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_line(process)
    return process


def wait_for_line(process):
    assert select.select([process.stdout], [], [], 60)[0], "the child said nothing"
    assert process.stdout.readline() == b"here\n", process.stderr.read()


def end_of(process):
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err.decode()


def test_a_second_ctrl_c_ends_the_process_where_python_cannot_interrupt():
    process = child("""
    with interruptible("go on with: that"), stop_on_signals() as stop:
        print("here", flush=True)
        while not stop.set:
            time.sleep(0.01)
        print("here", flush=True)
        while True:
            ctypes.CDLL(None).sleep(100)  \
# as a compilation: no signal handler runs before it returns
    """)
    os.kill(process.pid, signal.SIGINT)
    wait_for_line(process)
    os.kill(process.pid, signal.SIGINT)
    assert end_of(process) == (EXIT_CODE, "\ngo on with: that\n")


def test_an_interruption_that_gets_lost_ends_the_process_after_a_while():
    process = child("""
    preemption.GRACE = 0.5
    with interruptible("go on with: that"):
        try:
            print("here", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            time.sleep(100)
    """)
    os.kill(process.pid, signal.SIGTERM)
    assert end_of(process) == (EXIT_CODE, "\ngo on with: that\n")
