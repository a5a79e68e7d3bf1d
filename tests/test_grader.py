"""The judge's words for everything that a learner's cell can be besides right."""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from grader import compare, gradebook, live, notebooks, workers
from grader.cell import Answer
from grader.compare import Tolerance
from grader.verdict import FAILED, PASSED, Verdict

from tests.learner import CHAPTER, Desk, solved

BORROWED = "Borrowed from minidsv3"
BODY = {
    "no colon": ("def softmax(x)\n    return x", "Python cannot read the cell"),
    "a magic": ("%timeit 3\ndef softmax(x):\n    return x", "A notebook command in"),
    "an endless loop": ("def softmax(x):\n    while True: pass", "No answer in time"),
    "a loop outside": ("while True: pass\ndef softmax(x): ...", "No answer in time"),
    "a loop that swallows": (
        "def softmax(x):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass",
        "No answer in time",
    ),
    "an array too large": (
        "def softmax(x):\n    return np.zeros(10**11)",
        "Out of memory",
    ),
    "a list without end": (
        "def softmax(x):\n    a = []\n    while True: a.append(np.empty(2**27))",
        "Out of memory",
    ),
    "exit": ("def softmax(x):\n    exit()", "The cell calls exit()"),
    "sys.exit": (
        "import sys\ndef softmax(x):\n    sys.exit(0)",
        "The cell calls exit()",
    ),
    "os._exit": (
        "import os\ndef softmax(x):\n    os._exit(0)",
        "The answer ended its process",
    ),
    "a crash": (
        "import ctypes\ndef softmax(x):\n    ctypes.string_at(0)",
        "The answer ended its process",
    ),
    "None": ("def softmax(x):\n    e = np.exp(x)", "Your function returns None."),
    "still ...": (
        "def softmax(x):\n    x + 1\n    return ...",
        "Your function returns",
    ),
    "an import": (
        "from minidsv3.primitives.numpy_ref import softmax",
        "`softmax` is borrowed",
    ),
    "an import inside": (
        "def softmax(x):\n    from minidsv3.primitives import numpy_ref\n"
        "    return numpy_ref.softmax(x)",
        BORROWED,
    ),
    "an import by name": (
        "import importlib\ndef softmax(x):\n"
        "    m = importlib.import_module('minidsv3.primitives.numpy_ref')\n"
        "    return m.softmax(x)",
        BORROWED,
    ),
    "an import from the checks": (
        "import checks.lm_forward\ndef softmax(x): ...",
        "Borr",
    ),
    "torch's": (
        "import torch\ndef softmax(x):\n    return torch.tensor(x).softmax(-1).numpy()",
        "Borrowed from torch",
    ),
    "another name": ("def my_softmax(x):\n    return x", "No `softmax` in the cell"),
    "an alias": ("softmax = np.exp", "`softmax` is borrowed"),
    "two results": (
        "def softmax(x):\n    return x, x",
        "Your function returns a tuple of 2; expected one array.",
    ),
    "an axis lost": (
        "def softmax(x):\n    return x.sum(-1)",
        "The result has shape (2,), expected (2, 3).",
    ),
    "transposed": (
        "def softmax(x):\n    return x.T",
        "The result has shape (3, 2), expected (2, 3). Is it transposed?",
    ),
    "whole numbers": (
        "def softmax(x):\n    return x.astype(int)",
        "The result holds whole numbers (int64); expected floats.",
    ),
    "float16": (
        "def softmax(x):\n    return x.astype(np.float16)",
        "The result is float16",
    ),
    "complex": ("def softmax(x):\n    return x + 0j", "The result holds complex numb"),
    "text": ("def softmax(x):\n    return 'hello'", "The result holds text"),
    "ragged": (
        "def softmax(x):\n    return [1, [2, 3]]",
        "The result is a list; expected an array.",
    ),
    "a generator": ("def softmax(x):\n    yield x", "The result holds a generator"),
    "nan": (
        "def softmax(x):\n    return x * np.nan",
        "The result[0, 0] is nan, expected 0.04201.",
    ),
    "an unknown name": (
        "def softmax(x):\n    return helper(x)",
        "NameError: name 'helper' is not defined",
    ),
    "no arguments": ("def softmax():\n    return 1", "TypeError: softmax() takes 0"),
    "calls itself": (
        "def softmax(x):\n    return softmax(x)",
        "The function calls itself without end",
    ),
    "an exception": (
        "def softmax(x):\n    raise NotImplementedError('later')",
        "NotImplementedError: later",
    ),
    "the input changed": (
        "def softmax(x):\n    x -= x.max(-1, keepdims=True)\n    e = np.exp(x)\n"
        "    return e / e.sum(-1, keepdims=True)",
        "Your function changes its argument `x`",
    ),
    "the opposite sign": (
        "def softmax(x):\n    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    return -e / e.sum(-1, keepdims=True)",
        "The result: every number has the opposite sign",
    ),
    "NumPy itself changed": (
        "np.exp = lambda x: x\ndef softmax(x):\n    return np.exp(x)",
        "The result: 6 of 6 numbers differ",
    ),
}


def judge(text: str, id_: str = "lm.1", seconds: float = 2.0) -> Verdict:
    return workers.judged(Answer(id_, f"# exercise: {id_}\n{text}"), seconds)


@pytest.mark.parametrize(("text", "headline"), BODY.values(), ids=BODY)
def test_what_is_wrong_is_said(text, headline):
    said = judge(text)
    assert said.state == FAILED
    assert said.headline.startswith(headline), said.text()


@pytest.mark.parametrize(
    "text",
    [
        "softmax = lambda x: (e := np.exp(x - x.max(-1, keepdims=True))) / "
        "e.sum(-1, keepdims=True)",
        "import math\ndef helper(x):\n    return np.exp(x)\ndef softmax(x):\n"
        "    e = helper(x - x.max(-1)[..., None])\n    return e / e.sum(-1)[..., None]",
        "def softmax(x):\n    out = np.zeros((2, *x.shape))\n"
        "    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    out[1] = e / e.sum(-1, keepdims=True)\n    return out[1]",
        "kept = {}\ndef softmax(x):\n    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    kept['last'] = e / e.sum(-1, keepdims=True)\n    return kept['last']",
    ],
    ids=["a lambda", "helper and import in the cell", "a view", "a global"],
)
def test_what_is_right_passes_however_it_is_written(text):
    said = judge(text)
    assert said.state == PASSED, said.text()


def test_one_result_array_written_over_again_and_again():
    """The second call changes what the first returned: each case has its own."""
    said = judge(
        "out = np.zeros((9, 9, 9))\ndef softmax(x):\n"
        "    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    view = out.ravel()[: x.size].reshape(x.shape)\n"
        "    view[...] = e / e.sum(-1, keepdims=True)\n    return view"
    )
    assert said.state == PASSED, said.text()


def test_the_line_of_a_failure_is_named():
    said = judge("def softmax(x):\n    y = 1\n    return x / undefined")
    assert said.advice == "line 4 of lm.1: `return x / undefined`"
    assert said.unknown_name == "undefined"
    said = judge("def softmax(x):\n    while True:\n        x = x + 1", seconds=0.5)
    assert said.advice.startswith("It was in line")


def test_ten_megabytes_of_print_are_cut_and_shown():
    said = judge(
        "def softmax(x):\n    for i in range(30):\n        print('row', i)\n"
        "    print('z' * 10_000_000)\n    return x"
    )
    assert "row 11\n" in said.text() and "row 12" not in said.text()
    assert "... and 19 lines more" in said.text()
    assert len(said.text()) < 2_000
    quiet = judge(
        "def softmax(x):\n    import os\n    os.write(1, b'loud')\n    return x"
    )
    assert "loud" not in quiet.text()


def test_only_the_failing_case_shows_its_prints():
    said = judge(
        "def softmax(x):\n    print('shape', x.shape)\n"
        "    e = np.exp(x)\n    return e / e.sum(-1, keepdims=True)"
    )
    assert said.headline == "Looks like: no maximum subtracted"
    assert "case 3 of 6" in said.detail and "is nan, expected" in said.detail
    assert said.printed == "shape (1, 4)\n"


def test_a_named_mistake_still_says_which_of_several_results_is_shown():
    said = judge(
        "def route(u, W, b, lam, choose):\n"
        "    s = 1 / (1 + np.exp(-u @ W.T))\n"
        "    experts = choose(s + b)\n"
        "    chosen = np.take_along_axis(s + b, experts, axis=1)\n"
        "    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)\n"
        "    return experts, gates, s",
        "moe.1",
    )
    assert said.headline == "Looks like: gates from the biased scores"
    assert "\n  gates: 2 of 2 numbers differ\n  yours  " in said.detail
    only = judge("def softmax(x):\n    e = np.exp(x)\n    return e / e.sum()")
    assert "looks like: one maximum and one sum" in only.headline
    assert "differ" not in only.detail


def test_a_limit_on_memory_leaves_the_next_answer_alone():
    assert judge("def softmax(x):\n    return np.zeros(10**11)").state == FAILED
    assert judge(solved("lm.1")).state == PASSED


def test_a_broken_grader_does_not_blame_the_learner(monkeypatch):
    with pytest.raises((RuntimeError, KeyError), match=r"lm\.99"):
        workers.judged(Answer("lm.99", "def f(): ..."))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_warm_check_is_quick_and_leaves_no_process():
    """No limit here (machines are busy): a cold start would take half a second."""
    import multiprocessing

    judge(solved("lm.1"))
    began = time.perf_counter()
    judge(solved("lm.1"))
    assert time.perf_counter() - began < 60
    assert not multiprocessing.active_children()


# --- comparing --------------------------------------------------------------------

TOL = Tolerance(1e-4, 1e-5)
A = np.array([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
FAULTS = [
    (A * 1.001, "X: every number is 1.001 times the expected one"),
    (A + 2, "X: every number is off by the same 2"),
    (np.where(A == 5, 5.1, A), "X: 1 of 6 numbers differ"),
    (A[:, :, None], "X has shape (2, 3, 1), expected (2, 3). An axis of length 1"),
    (21.0, "X has shape (), expected (2, 3). Did a sum take all axes?"),
    (A.astype(object), "X holds objects"),
    (A.tolist(), "X is a list; expected an array."),
    (None, "X is None."),
    (..., "X is still the placeholder"),
]


@pytest.mark.parametrize(("yours", "message"), FAULTS)
def test_a_fault_is_described(yours, message):
    said = compare.fault((yours, A), (A, A), ("X", "Y"), TOL)
    assert said.startswith(message), said


@pytest.mark.filterwarnings("error")
def test_what_should_be_nothing_but_zeros_has_no_factor():
    said = compare.fault(np.array([0, 0, 3]), (np.zeros(3, int),), ("X",), TOL)
    assert said.startswith("The result: 1 of 3 numbers differ\nyours     [0 0 3]")


@pytest.mark.parametrize(
    "yours", [A, A.astype(np.float32), A * (1 + 1e-6), np.asfortranarray(A)]
)
def test_what_is_near_enough_is_no_fault(yours):
    assert compare.fault((yours, A), (A, A), ("X", "Y"), TOL) is None
    assert compare.fault([yours, A], (A, A), ("X", "Y"), TOL) is None
    by_name = compare.ByName(Y=A, X=yours)
    assert compare.fault(by_name, (A, A), ("X", "Y"), TOL) is None


def test_number_and_names_of_results():
    names = ("X", "Y")
    said = compare.fault((A,), (A, A), names, TOL)
    assert said == "Your function returns a tuple of 1; expected 2: (X, Y)."
    said = compare.fault({"X": A, "Y": A}, (A, A), names, TOL)
    assert said == "Your function returns a dictionary; expected 2: (X, Y)."
    said = compare.fault(compare.ByName(X=A, Z=A), (A, A), names, TOL)
    assert said.endswith("right keys: Y missing; Z not asked for.")
    square = np.arange(4.0).reshape(2, 2)
    said = compare.fault(square.T, (square,), ("X",), TOL)
    assert said.startswith("The result: the numbers are right but transposed")


def test_infinity_counts_by_its_sign():
    x = np.array([np.inf, 1.0])
    assert compare.fault(x, (x,), ("X",), TOL) is None
    assert compare.fault(-x, (x,), ("X",), TOL) is not None
    nan = np.array([np.nan, 1.0])
    assert compare.fault(nan, (nan,), ("X",), TOL) is None


def test_tiny_numbers_are_compared_too():
    tiny = np.array([1e-12, -3e-12])
    assert compare.fault(np.zeros(2), (tiny,), ("X",), TOL) is not None


@pytest.mark.parametrize(
    ("yours", "message"),
    [
        ((A[0], A[0, :2]), "X has shape (3,), expected (2, 3)."),
        ((A[:, 0], A), "X has shape (2,), expected (2, 3). That is the shape of Y"),
        ((A, A), "Y has shape (2, 3), expected (2,). Is a sum over one axis missing?"),
        ((A, 1.0), "Y has shape (), expected (2,). Did a sum take all axes?"),
    ],
)
def test_a_wrong_shape_among_several_results(yours, message):
    said = compare.fault(yours, (A, A[:, 0]), ("X", "Y"), TOL)
    assert said.startswith(message), said


def test_a_result_of_the_right_shape_is_not_called_exchanged():
    said = compare.fault((A[:, 0], A[:, 0]), (A, A[:, 0]), ("X", "Y"), TOL)
    assert said.startswith("X has shape (2,), expected (2, 3).")
    assert "exchanged" not in said


# --- in the notebook --------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A notebook's history; its saved file is another matter."""
    raw = SimpleNamespace(input_hist_raw=[""])
    shell = SimpleNamespace(history_manager=raw)
    monkeypatch.setattr(live, "in_notebook", lambda: shell)
    saved: dict[str, list] = {}
    monkeypatch.setattr(live, "saved_places", lambda: saved)

    def save(id_: str, text: str) -> None:
        saved[id_] = [notebooks.Place(id_, tmp_path / CHAPTER, 4, text)]

    return SimpleNamespace(run=raw.input_hist_raw.append, save=save)


def printed(capsys) -> str:
    return capsys.readouterr().out.replace("\033[0m", "").replace("\033[3", "")


def test_check_judges_what_was_run_last(kernel, capsys):
    live.check("lm.1")
    assert "run its cell first" in printed(capsys)
    kernel.run(solved("lm.1"))
    kernel.run("# exercise: lm.1\r\ndef softmax(x):\r\n    return x\r\n")
    live.check("lm.1")
    said = printed(capsys)
    assert "✗ failed  lm.1" in said and 'stuck?  hint("lm.1")' in said
    kernel.run(solved("lm.1"))
    live.check("lm.1")
    said = printed(capsys)
    assert "✓ passed  lm.1" in said and "next: lm.2" in said
    assert "minidsv3/primitives/numpy_ref.py" in said


@pytest.mark.parametrize("first", ["%%time\n# exercise: lm.1\n", ""])
def test_a_later_cell_without_its_first_line_is_not_passed_over(kernel, capsys, first):
    kernel.run(solved("lm.1"))
    kernel.run(f"{first}def softmax(x):\n    return 7")
    live.check("lm.1")
    said = printed(capsys)
    assert "the cell run as [2] defines `softmax`" in said and "passed" not in said
    assert not live.passed("lm.1")
    live.check_all()
    assert "0/11 passed" in printed(capsys)


def test_a_magic_in_the_answer_is_seen_as_typed(kernel, capsys):
    kernel.run("# exercise: lm.1\n%timeit 3\ndef softmax(x):\n    return x")
    live.check("lm.1")
    assert "A notebook command in the answer" in printed(capsys)


def test_a_verdict_of_time_is_not_remembered(monkeypatch):
    answers = iter(
        [Verdict("lm.1", FAILED, gradebook.NO_ANSWER), Verdict("lm.1", PASSED)]
    )
    monkeypatch.setattr(gradebook, "judged", lambda answer: next(answers))
    text = solved("lm.1") + "\n# slow\n"
    states = [gradebook.verdict_on("lm.1", text, {}).state for _ in range(3)]
    assert states == [FAILED, PASSED, PASSED]


def test_an_interrupted_check_says_so(kernel, capsys, monkeypatch):
    def interrupt(id_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "current_verdict", interrupt)
    live.check("lm.1")
    assert printed(capsys) == "lm.1: stopped.\n"


def test_unsaved_answers_are_pointed_out(kernel, capsys):
    kernel.run(solved("lm.1"))
    live.check("lm.1")
    assert "Not saved yet" in printed(capsys)
    kernel.save("lm.1", solved("lm.1") + "\n")
    live.check("lm.1")
    assert "Not saved yet" not in printed(capsys)
    kernel.save("lm.1", "# exercise: lm.1\ndef softmax(x):\n    return x")
    live.check("lm.1")
    assert "Not saved yet" in printed(capsys)


def test_a_helper_in_another_cell_is_found(kernel, capsys):
    kernel.run("def helper(x):\n    return x")
    kernel.run("# exercise: lm.1\ndef softmax(x):\n    return helper(x)")
    live.check("lm.1")
    assert "`helper` is defined in cell [1]." in printed(capsys)


def test_check_all_shows_the_whole_chapter(kernel, capsys):
    live.check_all()
    assert "No answer cell was run" in printed(capsys)
    kernel.run(solved("lm.1"))
    kernel.run("# exercise: lm.3\ndef rope(x, positions, base=1.0):\n    return x")
    live.check_all()
    said = printed(capsys)
    assert said.count("\n") == 12
    assert "✓ passed  lm.1     A softmax" in said and "✗ failed  lm.3     " in said
    assert said.rstrip().endswith("1/11 passed")
    assert live.passed("lm.1") and not live.passed("lm.3") and not live.passed("lm.2")


def test_hints_come_in_three_levels(capsys):
    live.hint("lm.1")
    assert capsys.readouterr().out.startswith("lm.1, hint 1 of 3: the idea\n  Adding")
    live.hint("lm.1", 3)
    assert "np.exp" in capsys.readouterr().out
    live.hint("lm.1", 4)
    assert capsys.readouterr().out == "level 4: there are hints 1 to 3\n"
    live.hint("xy.1")
    assert "there is no exercise xy.1" in capsys.readouterr().out
    live.check("lm.99")
    assert "There are lm.1, lm.2" in capsys.readouterr().out


def test_a_chapter_waits_for_its_parts(kernel):
    exercise = gradebook.find("lm.11")
    said = gradebook.waits_for(exercise, {"lm.1": solved("lm.1")})
    assert said.state == "todo"
    assert "lm.1 (" not in said.headline and "lm.2 (todo)" in said.headline


# --- the desk is a mess -----------------------------------------------------------


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


def last(said: str) -> str:
    return said.splitlines()[-1].strip("= ")


def test_two_different_answers_are_named_not_guessed(desk):
    desk.answer("lm.1", solved("lm.1"))
    desk.add_cell("# exercise: lm.1\ndef softmax(x):\n    return x", at=9)
    status, said = desk.grade()
    assert status == 1
    where = (
        "They stand in 01_transformer.ipynb, cell 4 and 01_transformer.ipynb, cell 10"
    )
    assert where in " ".join(said.split())
    assert last(said) == "1 failed, 10 todo in 0.00s"


def test_a_copied_notebook_is_no_contradiction(desk):
    copy = "01_transformer-Copy1.ipynb"
    desk.write(desk.read(), copy)
    desk.answer("lm.1", solved("lm.1"), copy)
    status, said = desk.grade()
    assert (status, last(said)) == (0, "1 passed, 10 todo in 0.00s")
    desk.answer("lm.1", "def softmax(x):\n    return x")
    status, said = desk.grade()
    assert (status, last(said)) == (1, "1 failed, 10 todo in 0.00s")
    assert "Two answers to one exercise" in said
    assert last(desk.grade(f"exercises/{copy}")[1]) == "1 passed, 10 todo in 0.00s"


def test_a_renamed_notebook_is_still_known(desk):
    desk.answer("lm.1", solved("lm.1"))
    desk.path().rename(desk.path("my own name.ipynb"))
    status, said = desk.grade()
    assert (status, last(said)) == (0, "1 passed, 10 todo in 0.00s")


def test_a_deleted_cell_is_missed(desk):
    notebook = desk.read()
    notebook.cells = [c for c in notebook.cells if c.get("id") != "lm-2-answer"]
    desk.write(notebook)
    status, said = desk.grade()
    assert status == 1
    assert "python exercises reset lm.2" in said
    assert last(said) == "1 failed, 10 todo in 0.00s"
    assert desk.command("reset", "lm.2").returncode == 0
    assert desk.grade()[0] == 0
    assert desk.read().cells[5].cell_type == "markdown"
    assert desk.read().cells[6].id == "lm-2-answer"


@pytest.mark.parametrize(
    "text", ["{", "", '{"cells": 3}', "<<<<<<< HEAD\n{}", "[1, 2]", "\x00\x01"]
)
def test_a_damaged_notebook_fails_alone(desk, text):
    desk.write(desk.read(), "another.ipynb")
    desk.path().write_text(text)
    status, said = desk.grade()
    assert status == 1
    assert "01_transformer.ipynb cannot be read as a notebook" in said
    assert "python exercises update" in said
    assert "Traceback" not in said
    assert last(said) == "1 failed, 11 todo in 0.00s"


def test_an_unheard_of_exercise(desk):
    desk.add_cell("# exercise: lm.77\ndef f(x):\n    return x", at=2)
    status, said = desk.grade()
    assert status == 1 and "There is no exercise lm.77" in said


def test_windows_line_ends(desk):
    desk.answer("lm.1", solved("lm.1").replace("\n", "\r\n"))
    text = desk.path().read_text().replace("\n", "\r\n")
    desk.path().write_text(text, newline="")
    status, said = desk.grade()
    assert (status, last(said)) == (0, "1 passed, 10 todo in 0.00s")


def test_where_a_name_comes_from():
    """A local variable of another cell's function is no helper."""
    assert notebooks.defines("def f(x):\n    t = 1\n    return t", "f")
    assert not notebooks.defines("def f(x):\n    t = 1\n    return t", "t")
    for cell in ("t = 1", "import a as t", "from a import t", "for t in x: pass"):
        assert notebooks.defines(cell, "t"), cell
    assert not notebooks.defines("def (", "t")


def test_from_another_folder_and_one_alone(desk, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    desk.answer("lm.1", solved("lm.1"))
    assert last(desk.grade(where=away)[1]) == "1 passed, 10 todo in 0.00s"
    one = f"{desk.path()}::lm.1"
    assert last(desk.grade(one, where=away)[1]) == "1 passed in 0.00s"
    assert last(desk.grade("-q", where=desk.exercises)[1]).startswith("1 passed")


def test_on_four_processes(desk):
    desk.answer("lm.1", solved("lm.1"))
    desk.answer("lm.2", "def causal_weights(scores):\n    return scores")
    status, said = desk.grade("-n", "4")
    assert status == 1
    assert "1/11 passed" in said and "next: lm.2" in said
    assert last(said) == "1 failed, 1 passed, 9 todo in 0.00s"


def test_a_helper_in_another_cell_of_the_saved_notebook(desk):
    desk.answer("lm.1", "def softmax(x):\n    return helper(x)")
    desk.add_cell("def helper(x):\n    return x", at=2)
    assert "`helper` is defined in cell 3." in desk.grade()[1]
