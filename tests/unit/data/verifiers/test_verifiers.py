"""Verifiers say 1 or 0 of a completion, and raise where the row cannot be judged by."""

import os
import re
import signal
import sys
import time

import pytest

from posttrain.data import verifiers
from posttrain.data.verifiers import formula
from posttrain.data.verifiers.numeric import last_number


def test_exact_ignores_blanks_around_and_takes_any_of_a_list():
    assert [verifiers.exact({"answer": "13 "}, text) for text in (" 13\n", "31", "1 3")] == [1.0, 0.0, 0.0]
    assert verifiers.exact({"answer": ["a", "b"]}, "b") == 1.0


@pytest.mark.parametrize(("row", "error"), [({}, KeyError), ({"answer": 13}, TypeError), ({"answer": []}, TypeError)])
def test_exact_refuses_a_row_without_a_text(row, error):
    with pytest.raises(error):
        verifiers.exact(row, "13")


def test_regex_looks_anywhere_unless_tied_to_the_ends():
    assert verifiers.regex({"pattern": r"\d+"}, "it is 7.") == 1.0
    assert verifiers.regex({"pattern": r"\A\d+\Z"}, "it is 7.") == 0.0
    with pytest.raises(re.error):
        verifiers.regex({"pattern": "("}, "7")


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("1234.5", "so it is 1,234.50", True),
        ("-3/4", "= -0.75", True),
        ("-3/4", r"= \boxed{-\frac{3}{4}}, not 7", True),
        ("0.75", "0.7500001", False),
        ("50%", "half: 1/2", True),
        ("50", "it is 50%", True),
        ("0.5", "it is 50%", True),
        ("5", "it is 50%", False),
        ("5", "$5", True),
        ("5", "5.", True),
        ("-5", "5", False),
        ("5", "from 3-5", True),
        ("2000", "2e3", True),
        ("5", "5 apples, or 6", False),
        ("5", "no number", False),
        ("5", "1/0", False),
        ("1", "it is 1 at x2", True),
        (5, "5", True),
        ("7", r"\boxed{6} and then \boxed{7}", True),
    ],
)
def test_numeric_compares_the_last_number_exactly(answer, completion, right):
    assert verifiers.numeric({"answer": answer}, completion) == float(right)


def test_numeric_takes_the_tolerance_of_the_row():
    assert verifiers.numeric({"answer": "100", "tolerance": 0.01}, "99.5") == 1.0
    assert verifiers.numeric({"answer": "100", "tolerance": 0.01}, "98.9") == 0.0


def test_numeric_refuses_an_answer_without_a_number():
    with pytest.raises(ValueError, match="no number in the answer 'many'"):
        verifiers.numeric({"answer": "many"}, "5")


@pytest.mark.parametrize("text", ["9" * 200_000, "1e999999999", "1/" * 100_000, r"\boxed{" * 50_000, "- " * 100_000])
def test_numeric_reads_any_text_in_little_time(text):
    start = time.process_time()
    last_number(text)
    assert time.process_time() - start < 5


def block(program):
    return f"Here it is:\n```python\n{program}\n```\nDone."


def test_code_runs_the_last_block_against_the_tests():
    row = {"tests": ["assert f(2) == 4", "assert f(-1) == 1"]}
    good, bad = block("def f(x): return x * x"), block("def f(x): return x + 3")
    assert verifiers.code(row, [good, bad, bad + good, "def f(x): return x * x"]) == [1.0, 0.0, 1.0, 0.0]


def test_code_compares_what_is_printed():
    row = {"tests": [{"input": "3\n", "output": "9"}, {"input": "4\n", "output": "16"}]}
    assert verifiers.code(row, [block("print(int(input()) ** 2)"), block("print(9)")]) == [1.0, 0.0]


BAD = {
    "an endless loop": "while True: pass",
    "a deep sleep": "import time; time.sleep(3600)",
    "too much memory": "x = bytearray(3 << 30)",
    "too many processes": "import os\nwhile True: os.fork()",
    "too much output": "print('x' * 5_000_000)",
    "an end before the tests": "import os; os._exit(0)",
    "a file too large": "open('f', 'wb').write(bytes(64 << 20))",
    "an error": "1 / 0",
}


@pytest.mark.parametrize("program", BAD.values(), ids=BAD)
def test_a_program_that_passes_a_limit_has_failed(program):
    assert verifiers.code({"tests": "assert True", "limit_s": 2}, [block(program)]) == [0.0]


def test_a_program_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    program = block("import os\nassert 'AWS_SECRET_ACCESS_KEY' not in os.environ\nassert os.getcwd() != '/'")
    assert verifiers.code({"tests": "assert True"}, [program]) == [1.0]


@pytest.mark.skipif(os.system("unshare -rn true 2>/dev/null") != 0, reason="this machine has no user namespaces")
def test_a_program_has_no_network_where_namespaces_are():
    program = block("import socket\nnames = [name for _, name in socket.if_nameindex()]")
    assert verifiers.code({"tests": "assert names == ['lo'], names"}, [program]) == [1.0]


@pytest.mark.parametrize("tests", [None, [], 7, [7], [{"input": "1"}], [{"input": 1, "output": "1"}]], ids=str)
def test_code_refuses_tests_of_neither_kind(tests):
    with pytest.raises(TypeError, match="neither Python source nor pairs"):
        verifiers.code({"tests": tests}, [block("1")])


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        (r"\frac{1}{2}", r"so $\frac{2}{4}$", True),
        ("x+1", r"\boxed{1+x}", True),
        ("12", "it is 13", False),
        ("12", "", False),
    ],
)
def test_math_compares_formulas(answer, completion, right):
    assert verifiers.math({"answer": answer}, completion) == float(right)


def test_math_that_is_not_done_in_time_is_an_error_and_the_next_is_compared(monkeypatch):
    verifiers.math({"answer": "1"}, "1")
    os.kill(formula._process.pid, signal.SIGSTOP)
    monkeypatch.setattr("posttrain.data.verifiers.formula.LIMIT_S", 0.2)
    with pytest.raises(TimeoutError, match=r"was not done in 0\.2 s"):
        verifiers.math({"answer": "1"}, "1")
    monkeypatch.undo()
    assert verifiers.math({"answer": "1"}, "1") == 1.0


def test_math_refuses_an_answer_without_a_formula():
    with pytest.raises(ValueError, match="no formula in the answer"):
        verifiers.math({"answer": "!?"}, "12")


def test_math_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'posttrain\[eval\]'"):
        verifiers.math({"answer": "1"}, "1")
