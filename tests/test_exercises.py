"""The exercises: what is committed, what passes, what fails and under which name."""

import ast
import subprocess
from pathlib import Path

import nbformat
import pytest
from grader import build, spec
from grader.cell import Answer
from grader.source import SOLUTIONS, SourceError, exercises, find, read
from grader.verdict import FAILED, PASSED, TODO
from grader.workers import judged
from nbclient import NotebookClient

from tests.learner import ALL, CHAPTER, ROOT, Desk, solved, steady

IDS = list(exercises())
LM = [id_ for id_ in IDS if find(id_).notebook == ALL[0]]
KERNELS = [id_ for id_ in IDS if find(id_).kind == "cuda" and id_ != "gpu.cuda.3"]
each = pytest.mark.parametrize("id_", IDS)


def parts_of(id_: str) -> dict[str, str]:
    """Right answers to what an exercise assembles."""
    return {part: solved(part) for part in find(id_).assembles}


def verdict(id_: str, text: str):
    return judged(Answer(id_, text, parts_of(id_)))


# --- what is committed ------------------------------------------------------------


def committed(path: Path) -> str:
    """A file as git has it: the working copy may be full of answers."""
    name = path.relative_to(ROOT).as_posix()
    show = ["git", "-C", str(ROOT), "show", f":{name}"]
    return subprocess.run(
        show, capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("path", build.outputs(), ids=lambda path: path.name)
def test_what_is_generated_has_not_drifted(path):
    assert committed(path) == build.outputs()[path], "run: python exercises build"


def test_a_build_gives_the_same_bytes_twice():
    source = SOLUTIONS / "01_transformer.py"
    assert build.written(build.notebook(source)) == build.written(
        build.notebook(source)
    )


def test_every_check_belongs_to_an_exercise():
    said = [
        check.id
        for path in sorted(spec.CHECKS.glob("*_*.py"))
        if path.stem != "__init__"
        for check in __import__(f"checks.{path.stem}", fromlist=["x"]).CHECKS
    ]
    assert sorted(said) == sorted(IDS)


@each
def test_there_is_enough_of_everything(id_):
    check = spec.find(id_)
    assert len(check.wrong) >= 3 and len(check.right) >= 1
    assert len({wrong.name for wrong in check.wrong}) == len(check.wrong)
    assert all(len(hint) > 20 for hint in check.hints)
    assert len(check.cases()) >= 3
    assert find(id_).task


def test_a_source_without_its_heading_is_refused(tmp_path):
    path = tmp_path / "09_x.py"
    path.write_text("# %% [markdown]\n# Text\n# %%\n# exercise: x.1\ndef f(): ...\n")
    with pytest.raises(SourceError, match=r"in front of x\.1 belongs a markdown cell"):
        list(read(path))


# --- right and wrong --------------------------------------------------------------


def ends_there(stub: str, placeholder: str) -> bool:
    """Whether a function of the cell, or a class's last method, ends in it."""
    ends = [node.body[-1] for node in ast.parse(stub).body if hasattr(node, "body")]
    ends += [end.body[-1] for end in ends if isinstance(end, ast.FunctionDef)]
    return placeholder in map(ast.unparse, ends)


@each
def test_the_stub_is_todo_and_ends_in_a_return(id_):
    exercise = find(id_)
    assert verdict(id_, exercise.stub).state == TODO
    wanted = "..." if id_ in KERNELS else "return ..."
    lines = [line for line in exercise.stub.splitlines() if line.strip() == wanted]
    assert lines
    assert ends_there(exercise.stub, wanted)
    commented = exercise.stub.replace(lines[0], f"    # a thought\n{lines[0]}")
    assert commented != exercise.stub and verdict(id_, commented).state == TODO


@each
def test_the_reference_passes(id_):
    said = verdict(id_, solved(id_))
    assert said.state == PASSED, said.text()


RIGHT = [(i, n) for i in IDS for n in range(len(spec.find(i).right))]
WRONG = [(i, wrong) for i in IDS for wrong in spec.find(i).wrong]


@pytest.mark.parametrize(("id_", "number"), RIGHT)
def test_another_way_of_writing_it_passes(id_, number):
    text = f"# exercise: {id_}\n{spec.find(id_).right[number]}"
    said = verdict(id_, text)
    assert said.state == PASSED, said.text()


@pytest.mark.parametrize(("id_", "wrong"), WRONG, ids=lambda x: getattr(x, "name", x))
def test_a_wrong_answer_is_called_by_its_own_name(id_, wrong):
    said = verdict(id_, wrong.patched(solved(id_)))
    assert said.state == FAILED
    assert said.headline == f"Looks like: {wrong.name}", said.text()
    assert said.advice == wrong.why


@pytest.mark.parametrize("old", ["nowhere to be found", "x"])
def test_a_patch_that_drifted_is_refused(old):
    wrong = spec.Wrong("a name", old, "y", "why")
    with pytest.raises(spec.SpecError, match="a name.*occurs .* times"):
        wrong.patched(solved("lm.1"))


# --- whole notebooks --------------------------------------------------------------


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def whole_desk(tmp_path) -> Desk:
    return Desk(tmp_path, ALL)


# What the experiment at a notebook's end prints, once all has passed.
EXPERIMENTS = {
    "01_transformer": "bits per byte",
    "02_mtp": "tokens per pass",
    "03_moe": "gamma = 0.001",
    "04_mla": "bytes a token",
    "05_mini": "leaning biases",
    "06_torch": "bytes a token",
    "09_generation": "tokens a round",
    "10_gpu": "plain_transpose\n",
    "11_measuring": "occupancy",
}


@pytest.mark.slow
@pytest.mark.parametrize("is_solved", [False, True], ids=["stubs", "solved"])
@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(whole_desk, source, is_solved):
    notebook = build.notebook(source, solved=is_solved)
    if is_solved:  # an assembled exercise may read the chapters before
        for other in build.sources():
            whole_desk.write(build.notebook(other, solved=True), f"{other.stem}.ipynb")
    whole_desk.write(notebook, f"{source.stem}.ipynb")
    folder = {"metadata": {"path": str(whole_desk.exercises)}}
    NotebookClient(notebook, timeout=120, resources=folder).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells
        for output in cell.get("outputs", [])
    )  # fmt: skip
    own = [e.id for e in exercises().values() if e.notebook == source.stem]
    state = "passed" if is_solved else "todo"
    for id_ in own:
        assert f"{state}\033[0m  {id_}\n" in said, said
    assert f"{len(own) if is_solved else 0}/{len(own)} passed" in said
    assert ("Not saved" in said) is False
    assert (EXPERIMENTS[source.stem] in said) is is_solved


FRESH = """\
exercises/01_transformer.ipynb -----------                               [ 18%]
exercises/02_mtp.ipynb -------                                           [ 31%]
exercises/03_moe.ipynb --------                                          [ 44%]
exercises/04_mla.ipynb --------                                          [ 58%]
exercises/05_mini.ipynb --                                               [ 62%]
exercises/06_torch.ipynb ---------                                       [ 77%]
exercises/09_generation.ipynb -----                                      [ 86%]
exercises/10_gpu.ipynb ------                                            [ 96%]
exercises/11_measuring.ipynb --                                          [100%]

= progress =
[------------------------------] 0/58 passed    CUDA: simulator
next: lm.1, 01_transformer.ipynb, cell 4    hint: python exercises hint lm.1
58 todo in 0.00s"""


def test_a_fresh_checkout_is_all_todo(whole_desk):
    status, said = whole_desk.grade()
    assert status == 0
    assert said == FRESH
    assert len(said.splitlines()) <= 15
    assert "\033[31m" not in whole_desk.grade("--color=yes")[1]


def test_one_chapter_follows_the_other(tmp_path):
    """What mtp.3 needs is chapter 1's reference, whatever the learner has there."""
    desk = Desk(tmp_path, ALL[:2])
    for id_ in LM:
        desk.answer(id_, solved(id_))
    desk.answer("lm.6", "def rmsnorm_backward(dy, x, g, eps):\n    return dy, g")
    desk.answer("mtp.3", solved("mtp.3"), "02_mtp.ipynb")
    _, said = desk.grade()
    assert said.splitlines()[-1] == "1 failed, 10 passed, 7 todo in 0.00s"
    desk.answer("lm.6", solved("lm.6"))
    status, said = desk.grade()
    assert (status, said.splitlines()[-1]) == (0, "12 passed, 6 todo in 0.00s")
    assert "next: mtp.1, 02_mtp.ipynb, cell 4" in said


ONE_WRONG = """\
exercises/01_transformer.ipynb .--F-------                               [100%]

= FAILURES =
_ lm.4  (01_transformer.ipynb, cell 13) _
Looks like: the gradient of the sum, not of the mean
  The loss is a mean over all B*T positions, so each position's gradient is
  divided by B*T.
case 1 of 4: two positions, three ids
  logits    [[[ 1.  0. -1.]
              [ 2.  2.  0.]]]
  targets   [[0 2]]
  yours     [[[-0.3348  0.2447  0.09  ]
              [ 0.4683  0.4683 -0.9366]]]
  expected  [[[-0.1674  0.1224  0.045 ]
              [ 0.2342  0.2342 -0.4683]]]
= progress =
[##----------------------------] 1/11 passed
01_transformer.ipynb: graded as saved 0 s ago (12:00:00)
next: lm.4, 01_transformer.ipynb, cell 13    hint: python exercises hint lm.4
1 failed, 1 passed, 9 todo in 0.00s"""


def test_a_wrong_answer_is_one_failure(desk):
    """lm.1 is right; lm.4, which lm.11 would assemble, is wrong."""
    desk.answer("lm.1", solved("lm.1"))
    desk.answer("lm.4", spec.find("lm.4").wrong[0].patched(solved("lm.4")))
    status, said = desk.grade()
    assert status == 1
    assert said == ONE_WRONG


def test_what_needs_an_exercise_gets_the_reference(desk):
    """lm.1 is wrong, lm.2 and lm.4 use it and pass all the same."""
    desk.answer("lm.1", "def softmax(x):\n    return x")
    for id_ in ("lm.2", "lm.4"):
        desk.answer(id_, solved(id_))
    status, said = desk.grade()
    assert status == 1
    assert said.splitlines()[-1] == "1 failed, 2 passed, 8 todo in 0.00s"


def test_the_assembled_exercise_waits_and_then_runs_the_own_parts(desk):
    for id_ in LM:
        desk.answer(id_, solved(id_))
    desk.answer("lm.5", "def embedding_backward(dy, ids, V):\n    return dy")
    status, said = desk.grade("-v")
    assert said.splitlines()[-1] == "= 1 failed, 9 passed, 1 todo in 0.00s ="
    desk.answer("lm.5", solved("lm.5"))
    status, said = desk.grade()
    assert (status, said.splitlines()[-1]) == (0, "11 passed in 0.00s")
    assert "All of them." in said
    # its own parts, not the references: one that adds a note shows up in the result
    noted = solved("lm.5").replace("return dW", "print('mine')\n    return dW")
    desk.answer("lm.5", noted)
    wrong = solved("lm.11").replace("dx1 = dx1 + dx2", "dx1 = dx2")
    desk.answer("lm.11", wrong)
    status, said = desk.grade(f"exercises/{CHAPTER}::lm.11")
    assert status == 1 and "mine" in said


def test_a_wrong_part_fails_in_the_assembly_only_by_what_it_does():
    """With a part that is wrong, the judge itself says no: the own part ran."""
    parts = parts_of("lm.11") | {
        "lm.9": solved("lm.9").replace("return da, db", "return db, da")
    }
    said = judged(Answer("lm.11", solved("lm.11"), parts))
    assert said.state == FAILED


def test_committed_notebooks_open_everywhere():
    for path, text in build.outputs().items():
        if path.suffix == ".ipynb":
            notebook = nbformat.reads(text, as_version=4)
            nbformat.validate(notebook)
            assert "\r" not in text


def test_the_transcript_in_the_readme_is_real(whole_desk):
    """It is what this very run prints, but for times and the width of a line."""
    whole_desk.answer("lm.1", solved("lm.1"))
    whole_desk.answer("lm.2", spec.find("lm.2").wrong[0].patched(solved("lm.2")))
    readme = (ROOT / "exercises/README.md").read_text(encoding="utf-8")
    block = readme.split("transcript -->")[1].removesuffix("<!-- end of ")
    command = f"pytest exercises/{CHAPTER}"
    shown = block.strip().removeprefix(f"```text\n$ {command}\n")
    assert steady(shown.removesuffix("```")) == whole_desk.grade(command.split()[1])[1]
