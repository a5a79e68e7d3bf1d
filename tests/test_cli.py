"""The command line as a user meets it: real processes, real files."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from minidsv3 import __main__ as command_line
from minidsv3 import checkpoints, parameters
from minidsv3.__main__ import main
from minidsv3.checkpoints import read_tensors
from minidsv3.config import TrainConfig
from minidsv3.corpus import encode, load_corpus
from minidsv3.generation import decoding
from minidsv3.generation.numpy_ref import generate, speculate
from minidsv3.shipped import MINI_FOLDER
from minidsv3.training import run_folder
from minidsv3.training.numpy_ref import evaluate, new_state, train

ROOT = Path(__file__).parent.parent
SIZES = "hidden_size=16 intermediate_size=24 num_hidden_layers=1 qk_rope_head_dim=8"
SETTINGS = [word for pair in SIZES.split() for word in ("--set", pair)]
TRAIN = ["train", "--backend", "numpy", *SETTINGS, "--batch-size", "2",
         "--sequence-length", "16", "--warmup-steps", "2"]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: naïve café\n" for i in range(400)))
    return path


def minidsv3(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minidsv3", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, **options
    )


def weights(folder: Path) -> dict[str, np.ndarray]:
    return checkpoints.load(folder)[1]


def test_train_evaluate_generate(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    done = minidsv3(*TRAIN, "--text", text, "--out", out, "--steps", "8")
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "8/8" in done.stderr
    assert len((out / "log.csv").read_text().splitlines()) == 9

    judged = minidsv3("evaluate", "--model", out, "--text", text)
    assert judged.returncode == 0, judged.stderr
    said = done.stdout.split("held-out text: ")[1].split()[0]
    assert judged.stdout.split()[0] == said

    written = [
        minidsv3("generate", "--model", out, "--prompt", "naï", "--max-new-tokens",
                 "30", "--seed", "3", encoding="utf-8", errors="replace")
        for _ in range(2)
    ]  # fmt: skip
    assert written[0].returncode == 0, written[0].stderr
    assert written[0].stdout == written[1].stdout
    assert written[0].stdout.startswith("naï") and len(written[0].stdout) > 4


def test_ctrl_c_saves_and_resume_continues_bit_for_bit(
    tmp_path: Path, text: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = [*TRAIN, "--text", text, "--steps", "400", "--save-every", "1000"]
    assert minidsv3(*common, "--out", whole).returncode == 0

    command = [sys.executable, "-m", "minidsv3", *map(str, common), "--out", broken]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_log(broken / "log.csv", rows=5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume" in output, output

    refused = minidsv3(*common, "--out", broken)
    assert refused.returncode == 2 and "holds a run already" in refused.stderr
    resumed = minidsv3(*common, "--out", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = weights(whole), weights(broken)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    logs = [(f / "log.csv").read_text().splitlines() for f in (whole, broken)]
    losses = [[row.split(",")[:2] for row in log] for log in logs]
    assert losses[0] == losses[1]


def test_the_command_does_what_the_library_does(
    tmp_path: Path, text: Path, capfdbinary
) -> None:
    """Seed, initial scale, held-out text and sampling values reach their places."""
    out = str(tmp_path / "run")
    settings = ["--steps", "1", "--seed", "5", "--set", "init_std=0.5",
                "--warmup-steps", "0"]  # fmt: skip
    assert main([*TRAIN, "--text", str(text), "--out", out, *settings]) == 0
    words = load_corpus(text)
    config, params = checkpoints.load(out)
    recipe = TrainConfig(
        steps=1, batch_size=2, sequence_length=16, warmup_steps=0, seed=5, init_std=0.5
    )
    state = new_state(parameters.initialise(config, 5, 0.5))
    [record] = train(state, config, recipe, words.train)
    assert all(np.array_equal(state.params[k], params[k]) for k in params)

    capfdbinary.readouterr()
    chosen = ["--model", out, "--text", str(text), "--sequence-length", "16"]
    assert main(["evaluate", *chosen]) == 0
    bits = evaluate(params, config, words.held_out, 16)
    assert capfdbinary.readouterr().out.startswith(f"{bits:.4f} bits".encode())

    for prompt in ("naï", ""):
        asked = ["--prompt", prompt, "--max-new-tokens", "20", "--seed", "7"]
        asked += ["--temperature", "0.6", "--top-p", "0.4"]
        assert main(["generate", "--model", out, *asked]) == 0
        start = encode(prompt) if prompt else np.array([256])
        new = generate(params, config, start[None].astype(int), 20, 0.6, 0.4, seed=7)
        written = bytes(i for i in new[0].tolist() if i < 256)
        assert capfdbinary.readouterr().out == prompt.encode() + written + b"\n"


def test_killed_at_any_moment_it_resumes(tmp_path: Path, text: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = [*TRAIN, "--text", text, "--steps", "120", "--save-every", "3"]
    assert minidsv3(*common, "--out", whole).returncode == 0
    command = [sys.executable, "-m", "minidsv3", *map(str, common), "--out", killed]
    for rows in (2, 20, 60):
        resume = (
            ["--resume"] if (killed / "training_state.safetensors").exists() else []
        )
        process = subprocess.Popen(
            [*command, *resume],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_log(killed / "log.csv", rows)
        process.kill()
        process.wait()
        saved = read_tensors(killed / run_folder.STATE)[1]
        assert int(saved["step"]) >= rows - 4  # the saves in between were made
    resumed = minidsv3(*common, "--out", killed, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    a, b = weights(whole), weights(killed)
    assert all(np.array_equal(a[k], b[k]) for k in a)


def wait_for_log(log: Path, rows: int) -> None:
    for _ in range(6000):
        if log.exists() and len(log.read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    raise AssertionError(f"{log} did not reach {rows} rows in a minute")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "hidden_sise=3"], "hidden_sise"),
        (["--set", "hidden_size"], "write FIELD=VALUE"),
        (["--set", "num_key_value_heads=3"], "num_key_value_heads"),
        (["--set", "kv_lora_rank=8"], "kv_lora_rank"),
        (["--mtp", "128"], "leaves MTP module 128 nothing to predict"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--sequence-length", "999"], "max_position_embeddings 512"),
        (["--steps", "0"], "steps"),
        (["--resume"], "no run to resume"),
        (["--set", "vocab_size=100"], "vocab_size = 100: text needs 257"),
        (["--text", ""], "--text is empty"),
        (["--set", "hidden_size=10000000000000"], "allocate"),
    ],
)
def test_bad_options_are_explained_without_a_traceback(
    arguments: list, message: str, tmp_path: Path, text: Path, capsys
) -> None:
    given = ["train", "--out", str(tmp_path / "run"), "--text", str(text), *arguments]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_too_little_text(tmp_path: Path, capsys) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\nthree\nfour\n")
    given = ["train", "--out", str(tmp_path / "run"), "--text", str(short)]
    assert main(given) == 2
    assert "more text or a smaller --sequence-length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0"),
        (["--max-new-tokens", "600"], "room for 1 to 512"),
        (["--prompt", "x" * 513], "513 tokens, this model reads at most 512"),
        (["--prompt", "\udcff"], "not UTF-8"),
        (["--model", "nowhere"], "nowhere holds no model.safetensors"),
    ],
)
def test_bad_requests_for_text(
    arguments: list, message: str, tmp_path: Path, text: Path, capsys
) -> None:
    out = str(tmp_path / "run")
    assert main([*TRAIN, "--text", str(text), "--out", out, "--steps", "2"]) == 0
    assert main(["generate", "--model", out, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_prompt_it_begins_a_document(
    tmp_path: Path, text: Path, capfdbinary
) -> None:
    out = str(tmp_path / "run")
    assert main([*TRAIN, "--text", str(text), "--out", out, "--steps", "2"]) == 0
    capfdbinary.readouterr()
    assert main(["generate", "--model", out, "--max-new-tokens", "9"]) == 0
    assert 0 < len(capfdbinary.readouterr().out.rstrip(b"\n")) <= 9


def test_help_lists_the_commands() -> None:
    said = minidsv3("--help", env=os.environ | {"COLUMNS": "80"}).stdout
    assert all(command in said for command in ("train", "generate", "evaluate"))


def test_a_diverged_run_keeps_its_last_good_state(
    tmp_path: Path, text: Path, capsys
) -> None:
    out = tmp_path / "run"
    wild = ["--learning-rate", "1e30", "--steps", "50", "--save-every", "1"]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*TRAIN, "--text", str(text), "--out", str(out), *wild]) == 2
    said = capsys.readouterr().err
    assert "not finite" in said or "NaN or infinity" in said
    tensors, _ = read_tensors(out / run_folder.STATE)
    assert all(np.isfinite(a).all() for a in tensors.values())


def test_changes_that_are_possible_only_together(tmp_path: Path, text: Path) -> None:
    heads = ["--set", "num_attention_heads=3", "--set", "num_key_value_heads=3"]
    given = [*TRAIN, "--text", str(text), "--out", str(tmp_path / "run"), *heads]
    assert main([*given, "--steps", "1", "--warmup-steps", "1"]) == 0
    assert checkpoints.load(tmp_path / "run")[0].num_attention_heads == 3


def test_a_short_run_shortens_its_warm_up(tmp_path: Path, text: Path) -> None:
    given = [
        "train",
        "--backend",
        "numpy",
        *SETTINGS,
        "--text",
        str(text),
        "--out",
        str(tmp_path / "run"),
    ]
    low = ["--steps", "3", "--learning-rate", "1e-5", "--sequence-length", "8"]
    assert main([*given, *low]) == 0


def test_new_text_is_judged_whole(tmp_path: Path, text: Path, capsys) -> None:
    out, other = str(tmp_path / "run"), tmp_path / "other.txt"
    assert main([*TRAIN, "--text", str(text), "--out", out, "--steps", "2"]) == 0
    other.write_text("a new line\n" * 50)
    capsys.readouterr()
    assert main(["evaluate", "--model", out, "--text", str(other)]) == 0
    assert "on 553 tokens of another text, windows of 16" in capsys.readouterr().out


def test_a_model_is_not_overwritten(tmp_path: Path, text: Path, capsys) -> None:
    out = tmp_path / "run"
    given = [*TRAIN, "--text", str(text), "--out", str(out), "--steps", "2"]
    assert main(given) == 0
    (out / run_folder.STATE).unlink()
    assert main(given) == 2
    assert "holds a run already, or a model" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("")
    assert main([*given[:-3], str(file), *given[-2:]]) == 2
    assert "is a file, name a folder" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN, "--text", str(text), "--out", str(out), "--steps", "2"]) == 0
    command = f"{sys.executable} -m minidsv3 generate --model {out} | head -c 5"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


# --- multi-token prediction ---------------------------------------------------------


def test_a_model_with_mtp_from_training_to_text(
    tmp_path: Path, text: Path, capfdbinary
) -> None:
    """Losses in the log, the module in the file, drafts counted on stderr."""
    out = tmp_path / "run"
    given = [*TRAIN, "--text", str(text), "--out", str(out), "--steps", "4"]
    assert main([*given, "--mtp", "2", "--backend", "numpy"]) == 0
    said = capfdbinary.readouterr()
    assert b"mtp_1" in said.err and b"mtp_2" in said.err
    header, *rows = (out / "log.csv").read_text().splitlines()
    assert header.split(",")[5:] == ["main_nats", "mtp_1_nats", "mtp_2_nats"]
    for row in rows:
        total, main_nats, *further = map(float, np.array(row.split(","))[[1, 5, 6, 7]])
        weight = 0.1 if row.startswith("4,") else 0.3  # 3 of 4 steps begin early
        assert total == pytest.approx(main_nats + weight / 2 * sum(further), rel=1e-6)
    config, params = checkpoints.load(out)
    assert config.num_nextn_predict_layers == 2

    assert main(["evaluate", "--model", str(out), "--text", str(text)]) == 0
    capfdbinary.readouterr()
    asked = ["generate", "--model", str(out), "--prompt", "line", "--temperature", "0"]
    asked += ["--max-new-tokens", "40"]
    assert main(asked) == 0
    speculative = capfdbinary.readouterr()
    *_, (_, counts) = speculate(params, config, encode("line")[None].astype(int), 40)
    assert speculative.err.decode() == (
        f"{counts.accepted} of {counts.drafts} drafts kept ({counts.acceptance:.0%}), "
        f"{counts.tokens_per_pass:.2f} tokens a pass of the trunk\n"
    )
    assert main([*asked, "--no-speculative"]) == 0
    plain = capfdbinary.readouterr()
    assert plain.out == speculative.out and plain.err == b""


def test_a_run_with_mtp_resumes_bit_for_bit(tmp_path: Path, text: Path) -> None:
    """Over the step where λ falls."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = [*TRAIN, "--mtp", "1", "--text", text, "--steps", "400",
             "--save-every", "5"]  # fmt: skip
    assert minidsv3(*given, "--out", whole).returncode == 0
    command = [sys.executable, "-m", "minidsv3", *map(str, given), "--out", broken]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_log(broken / "log.csv", rows=12)
    process.kill()
    process.wait()
    done = int(read_tensors(broken / run_folder.STATE)[1]["step"])
    assert 5 <= done < 400, "it ended before it was killed"
    assert minidsv3(*given, "--out", broken, "--resume").returncode == 0
    assert (broken / checkpoints.WEIGHTS).read_bytes() == (
        whole / checkpoints.WEIGHTS
    ).read_bytes()
    logs = [(f / "log.csv").read_text().splitlines() for f in (whole, broken)]
    losses = [[row.split(",")[:4] + row.split(",")[5:] for row in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 401


def test_a_file_without_its_modules_is_read_with_a_notice(
    tmp_path: Path, text: Path, capsys
) -> None:
    out = tmp_path / "run"
    given = [*TRAIN, "--text", str(text), "--out", str(out), "--steps", "1"]
    assert main([*given, "--mtp", "1", "--warmup-steps", "1"]) == 0
    tensors, _ = read_tensors(out / checkpoints.WEIGHTS)
    main_model = {k: a for k, a in tensors.items() if "layers.1." not in k}
    checkpoints.write_tensors(out / checkpoints.WEIGHTS, main_model, {})
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--text", str(text)]) == 0
    assert (
        "minidsv3: " in (said := capsys.readouterr().err) and "no MTP weights" in said
    )


# --- stops and streaming ------------------------------------------------------------

ASKED = ["generate", "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "40"]


def printed(capfdbinary, *more: str) -> bytes:
    """What a greedy call prints; of the model that comes with the package."""
    assert main([*ASKED, *more]) == 0
    return capfdbinary.readouterr().out


def test_the_shipped_model_is_what_generate_takes(capfdbinary) -> None:
    whole = printed(capfdbinary)
    config, params = checkpoints.load(MINI_FOLDER)
    new = generate(params, config, encode("def ")[None].astype(int), 40)
    assert whole == b"def " + bytes(i for i in new[0].tolist() if i < 256) + b"\n"


def check_stop(capfdbinary) -> None:
    """It ends before the text; what only begins like one is shown in the end."""
    whole = printed(capfdbinary)
    text = whole[4:-1]  # without the prompt and the last line's end
    for stop in (text[15:18], text[15:16], text[:1], text[9:30]):
        end = whole.index(stop, 4)
        assert printed(capfdbinary, "--stop", stop.decode()) == whole[:end] + b"\n"
    for unfinished in (text[-3:] + b"?never", text[-1:] + b"\n\nnever"):
        assert printed(capfdbinary, "--stop", unfinished.decode()) == whole
    two = ["--stop", text[20:23].decode(), "--stop", text[11:14].decode()]
    assert printed(capfdbinary, *two) == whole[: whole.index(text[11:14], 4)] + b"\n"
    assert printed(capfdbinary, *two, "--no-speculative") == printed(capfdbinary, *two)


def test_a_stop_is_not_shown(capfdbinary) -> None:
    check_stop(capfdbinary)


def check_streaming(monkeypatch) -> None:
    """Text is shown while more is computed, a token or two at a time."""
    events: list[str | bytes] = []
    passes = decoding._Loop._settled

    def settled(*given):
        events.append("pass")
        return passes(*given)

    monkeypatch.setattr(decoding._Loop, "_settled", settled)
    monkeypatch.setattr(command_line, "_write", events.append)
    assert main(ASKED) == 0
    first, *others = b"|".join(
        e.encode() if isinstance(e, str) else e for e in events
    ).split(b"pass")
    assert first == b"def |"
    assert len(others) > 20 and all(1 <= len(o.replace(b"|", b"")) <= 2 for o in others)


def test_text_is_shown_as_it_comes(monkeypatch, capsys) -> None:
    check_streaming(monkeypatch)


def test_without_numba_it_writes_the_same(monkeypatch, capfdbinary) -> None:
    whole = printed(capfdbinary)
    monkeypatch.setattr(decoding, "find_spec", {}.get)
    monkeypatch.setitem(sys.modules, "minidsv3.generation.compiled", None)
    assert printed(capfdbinary) == whole


@pytest.mark.parametrize(
    ("stop", "message"), [("", "a stop string is empty"), ("\udcff", "--stop is not")]
)
def test_bad_stops(stop: str, message: str, capfd) -> None:
    """Nothing is printed before, and no traceback."""
    assert main([*ASKED, "--stop", stop]) == 2
    said = capfd.readouterr()
    assert message in said.err and "Traceback" not in said.err and not said.out
