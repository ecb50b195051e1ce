"""Signals: the first one raises, the second one leaves the process."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agents.cli import main as command_line
from agents.cli.main import main, run_process
from agents.cli.signals import SIGNALS, Interrupted, exit_code
from benchmarks.kill import in_child

ALL = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), ALL)
def test_the_first_signal_raises(number, code):
    def wait():
        with SIGNALS.installed():
            os.kill(os.getpid(), number)
            time.sleep(10)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as raised:
        wait()
    assert exit_code(raised.value) == code
    assert signal.getsignal(number) == before


def test_ctrl_c_of_another_origin():
    assert exit_code(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(("number", "code"), ALL)
def test_a_signal_can_wait(number, code):
    with SIGNALS.installed():
        SIGNALS.allow()
        SIGNALS.deferred = True
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        with pytest.raises(Interrupted) as raised:
            SIGNALS.allow()
    assert raised.value.exit_code == code


@pytest.mark.parametrize("deferred", [False, True])
def test_the_second_signal_leaves_at_once(deferred):
    """Nothing holds it up, not even code that catches everything and waits."""

    def stubborn():
        with SIGNALS.installed():
            SIGNALS.deferred = deferred
            for _ in range(3):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
                except BaseException:
                    time.sleep(0.01)
        return 1

    assert in_child(stubborn) == 143


def test_a_signal_that_was_ignored_stays_ignored():
    """As under nohup, or in a background job of a shell without job control."""

    def ignoring():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with SIGNALS.installed():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        return 7

    assert in_child(ignoring) == 7


def test_another_thread_handles_no_signals():
    before, entered = signal.getsignal(signal.SIGTERM), []

    def enter():
        with SIGNALS.installed():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [before]


@pytest.mark.parametrize(("number", "code"), ALL)
def test_the_exit_code_of_a_command(monkeypatch, capsys, number, code):
    def interrupted(argv):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(command_line, "parse", interrupted)
    assert main(["train"]) == code
    assert capsys.readouterr().err == "dpok: interrupted\n"


def test_an_interrupted_process_waits_for_no_thread(monkeypatch):
    """Such as the one that waits for a reward that hangs."""

    def interrupted(argv):
        ThreadPoolExecutor().submit(time.sleep, 30)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(command_line, "parse", interrupted)
    monkeypatch.setattr("sys.argv", ["dpok", "train"])
    started = time.monotonic()
    assert in_child(run_process) == 143
    assert time.monotonic() - started < 10
