"""Hints, resets and updates: nothing that a learner wrote is ever lost."""

import os
import shutil
import subprocess

import nbformat
import pytest

from tests.learner import CHAPTER, Desk, solved

OWN = "# my experiment\nprint(softmax(np.zeros(3)))"


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "here")


def backups(desk: Desk) -> list:
    return sorted((desk.exercises / "backups").glob("*/*.ipynb"))


def sources_of(desk: Desk) -> list[str]:
    return [cell.source for cell in desk.read().cells]


def test_hint_on_the_command_line(desk):
    ran = desk.command("hint", "lm.3", "2")
    assert ran.returncode == 0
    assert ran.stdout.startswith("lm.3, hint 2 of 3: the call and its shapes\n")
    assert max(map(len, ran.stdout.splitlines())) <= 80
    assert desk.command("hint", "lm.3", "9").returncode == 2
    assert "there is no exercise lm.99" in desk.command("hint", "lm.99").stderr
    assert desk.command().returncode == 2


def test_reset_gives_one_stub_back_and_keeps_the_answer(desk):
    stub = desk.text_of("lm.1")
    desk.answer("lm.1", solved("lm.1"))
    desk.answer("lm.2", solved("lm.2"))
    before = desk.path().read_text()
    ran = desk.command("reset", "lm.1")
    assert ran.returncode == 0 and "Reload Notebook from Disk" in ran.stdout
    assert desk.text_of("lm.1") == stub
    assert desk.text_of("lm.2") == solved("lm.2")
    [kept] = backups(desk)
    assert kept.read_text() == before
    assert str(kept) in ran.stdout
    assert "stub already" in desk.command("reset", "lm.1").stdout
    assert len(backups(desk)) == 1


def test_reset_refuses_what_it_cannot_do(desk):
    ran = desk.command("reset", "lm.99")
    assert ran.returncode == 2 and "there is no exercise lm.99" in ran.stderr
    desk.path().write_text("{")
    ran = desk.command("reset", "lm.1")
    assert ran.returncode == 2 and "cannot be read" in ran.stderr
    assert desk.path().read_text() == "{"
    desk.path().unlink()
    assert "python exercises update" in desk.command("reset", "lm.1").stderr


def test_build_never_writes_over_answers(desk):
    desk.answer("lm.1", solved("lm.1"))
    before = desk.path().read_text()
    ran = desk.command("build")
    assert ran.returncode == 2 and "holds answers (lm.1)" in ran.stderr
    assert desk.path().read_text() == before


def test_check_names_what_has_drifted(desk):
    assert desk.command("build", "--check").returncode == 0
    source = desk.root / "solutions/01_transformer.py"
    source.write_text(source.read_text().replace("survives 1000", "survives 2000"))
    ran = desk.command("build", "--check")
    assert ran.returncode == 1
    assert "01_transformer.ipynb: has drifted" in ran.stdout
    assert "README.md: has drifted" in ran.stdout
    assert desk.command("build").returncode == 0
    assert desk.command("build", "--check").returncode == 0
    assert "survives 2000" in desk.path().read_text()


def change_upstream(desk: Desk) -> None:
    """The next version: one heading is another."""
    source = desk.root / "solutions/01_transformer.py"
    text = source.read_text()
    assert text.count("Where is a byte?") == 1
    source.write_text(text.replace("Where is a byte?", "Where is that byte?"))


def test_update_puts_answers_and_own_cells_back(desk):
    desk.answer("lm.1", solved("lm.1"))
    desk.answer("lm.3", "def rope(x, positions, base=1.0):\n    return x  # so far")
    desk.add_cell(OWN, at=5)
    notebook = desk.read()
    notebook.cells[0].source += "\n\nMy remark."
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# My title"))
    notebook.cells[4].outputs = [nbformat.v4.new_output("stream", text="old")]
    desk.write(notebook)
    change_upstream(desk)
    ran = desk.command("update")
    assert ran.returncode == 0, ran.stderr
    assert "notebooks written: 1, answers put in: 2\n" in ran.stdout
    cells = sources_of(desk)
    assert desk.text_of("lm.1") == solved("lm.1")
    assert "# so far" in desk.text_of("lm.3")
    assert any("Where is that byte?" in text for text in cells)
    assert cells[0] == "# My title"
    assert sum("My remark." in text for text in cells) == 1
    assert cells.count(OWN) == 1
    after = desk.read().cells[cells.index(OWN) - 1]
    assert after.id == "lm-1-check"
    ids = [cell.id for cell in desk.read().cells]
    assert len(ids) == len(set(ids))
    nbformat.validate(desk.read())
    assert desk.grade()[0] == 1  # lm.3 is graded, lm.1 passes


def test_update_twice_changes_nothing_more(desk):
    desk.answer("lm.1", solved("lm.1"))
    desk.add_cell(OWN, at=5)
    assert desk.command("update").returncode == 0
    once = sources_of(desk)
    assert desk.command("update").returncode == 0
    assert sources_of(desk) == once
    assert len(backups(desk)) == 2


def test_update_takes_answers_from_another_copy(desk, tmp_path):
    old = Desk(tmp_path / "old")
    old.answer("lm.2", solved("lm.2"))
    old.add_cell(OWN, at=8)
    old.path().rename(old.path("renamed.ipynb"))
    ran = desk.command("update", "--from", str(old.exercises))
    assert ran.returncode == 0, ran.stderr
    assert desk.text_of("lm.2") == solved("lm.2")
    ran = desk.command("update", "--from", str(tmp_path / "nowhere"))
    assert ran.returncode == 2 and "holds no notebooks" in ran.stderr
    assert desk.text_of("lm.2") == solved("lm.2")


def test_update_repairs_a_damaged_and_a_missing_notebook(desk):
    desk.write(desk.read(), "copy.ipynb")
    desk.answer("lm.1", solved("lm.1"), "copy.ipynb")
    desk.path().write_text("{ broken")
    ran = desk.command("update")
    assert ran.returncode == 0
    assert "01_transformer.ipynb cannot be read" in ran.stdout
    assert desk.text_of("lm.1") == solved("lm.1")
    assert any(path.read_text() == "{ broken" for path in backups(desk))
    desk.path().unlink()
    assert desk.command("update").returncode == 0
    assert desk.text_of("lm.1") == solved("lm.1")


def git(folder, *words: str) -> None:
    env = os.environ | {
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c",
    }  # fmt: skip
    subprocess.run(["git", *words], cwd=folder, check=True, env=env)


@pytest.fixture
def cloned(desk, tmp_path) -> tuple[Desk, Desk]:
    """An upstream repository, and a learner's clone of it."""
    (desk.root / ".gitignore").write_text("exercises/backups/\n__pycache__/\n")
    git(desk.root, "init", "-q", "-b", "main")
    git(desk.root, "add", "-A")
    git(desk.root, "commit", "-qm", "one")
    git(tmp_path, "clone", "-q", str(desk.root), "clone")
    learner = Desk.__new__(Desk)
    learner.root, learner.exercises = tmp_path / "clone", tmp_path / "clone/exercises"
    return desk, learner


def test_update_pulls_past_answers(cloned):
    upstream, learner = cloned
    learner.answer("lm.1", solved("lm.1"))
    learner.add_cell(OWN, at=5)
    change_upstream(upstream)
    assert upstream.command("build").returncode == 0
    git(upstream.root, "commit", "-qam", "two")
    ran = learner.command("update", "--pull")
    assert ran.returncode == 0, ran.stderr
    assert "Where is that byte?" in learner.path().read_text()
    assert learner.text_of("lm.1") == solved("lm.1")
    assert OWN in sources_of(learner)


def test_a_failed_pull_changes_nothing(cloned):
    upstream, learner = cloned
    learner.answer("lm.1", solved("lm.1"))
    before = learner.path().read_text()
    shutil.rmtree(upstream.root / ".git")
    ran = learner.command("update", "--pull")
    assert ran.returncode == 2 and "git pull" in ran.stderr
    assert learner.path().read_text() == before
    assert CHAPTER in {path.name for path in backups(learner)}
