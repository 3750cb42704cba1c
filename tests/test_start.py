"""start.py: a mistake, Ctrl-C, a closed pipe, a poor terminal: each costs a line, and no work."""
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from plumbing.flags import UserError
from plumbing.start import Output, main_with_user_errors


def test_ctrl_c_while_torch_is_being_imported_is_one_line():
    process = subprocess.Popen([sys.executable, "train.py", "--help"], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(0.4)  # numpy and torch take longer
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    if process.returncode != 0:  # else the machine was so fast that --help was there already
        assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error, error


@pytest.mark.parametrize("error, code, line", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (UserError("give another --data"), 2, "error: give another --data")])
def test_ctrl_c_in_a_program_and_a_mistake_are_one_line(capsys, error, code, line):
    def mistaken():
        print("so far")
        raise error
    with pytest.raises(SystemExit) as stopped:
        main_with_user_errors(mistaken)
    assert stopped.value.code == code and capsys.readouterr().err.strip() == line


def test_another_programs_ctrl_c_is_left_alone():
    """Whoever imports the project, a notebook say, keeps its own handler."""
    code = ("import signal; before = signal.getsignal(signal.SIGINT); import plumbing.start; "
            "print(signal.getsignal(signal.SIGINT) is before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_reader_that_goes_away_does_not_end_the_program():
    code = ("import sys; from plumbing.start import main_with_user_errors as m, output_gone\n"
            "def main():\n"
            "    print('first', flush=True); sys.stdin.read(); print('second', flush=True)\n"
            "    print('gone', output_gone(), file=sys.stderr)\n"
            "m(main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.close()
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
