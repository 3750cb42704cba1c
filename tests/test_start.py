"""start.py: a mistake, Ctrl-C, a closed pipe, a poor terminal: each costs a line, and no work."""
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plumbing.flags import UserError
from plumbing.start import Output, main_with_user_errors

ROOT = Path(__file__).parent.parent


def test_ctrl_c_while_torch_is_being_imported_is_one_line():
    process = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.4)  # numpy and torch take longer
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    if process.returncode != 0:  # else the machine was so fast that --help was there already
        assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error, error


def test_ctrl_c_in_a_program_is_one_line_and_130(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        main_with_user_errors(interrupted)
    assert stopped.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"


def test_a_mistake_is_one_line_and_2_and_comes_last(capsys):
    def mistaken():
        print("so far")
        raise UserError("give another --data")
    with pytest.raises(SystemExit) as stopped:
        main_with_user_errors(mistaken)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: give another --data\n"


def test_another_programs_ctrl_c_is_left_alone():
    """Whoever imports the project, a notebook say, keeps its own handler."""
    code = ("import signal; before = signal.getsignal(signal.SIGINT); import plumbing.start; "
            "print(signal.getsignal(signal.SIGINT) is before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_reader_that_goes_away_does_not_end_the_program():
    code = ("import sys, time; from plumbing.start import main_with_user_errors as m, output_gone\n"
            "def main():\n"
            "    print('first', flush=True); time.sleep(1); print('second', flush=True)\n"
            "    print('gone', output_gone(), file=sys.stderr)\n"
            "m(main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    assert process.stderr.read().strip() == "gone True" and process.wait(timeout=60) == 0


def test_what_a_terminal_cannot_spell_is_escaped():
    code = "from plumbing.start import main_with_user_errors as m; m(lambda: print('caf\u00e9'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and done.stdout == "caf\\xe9\n", done.stderr


def test_a_stream_that_was_closed_before_the_start_swallows_what_is_written():
    output = Output(None)
    output.write("nobody reads this")
    output.flush()
    assert not output.gone


BAR = """
import time
from tqdm import tqdm
from plumbing.flags import UserError
from plumbing.start import main_with_user_errors
def main():
    bar = tqdm(total=100, mininterval=0)
    for k in range(100):
        time.sleep(0.01)
        bar.update()
        if k == 20:
            raise {error}
main_with_user_errors(main)
"""


@pytest.mark.parametrize("error, line", [("UserError('a torn picture')", "error: a torn picture"),
                                         ("KeyboardInterrupt", "interrupted"),
                                         ("RuntimeError('a fault')", "RuntimeError: a fault")])
def test_an_error_in_the_middle_of_a_bar_is_the_last_line_and_one_of_its_own(error, line):
    done = subprocess.run([sys.executable, "-c", BAR.format(error=error)], cwd=ROOT, text=True,
                          capture_output=True)
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert lines[-1] == line and "21/100" in "".join(lines), done.stderr
