"""From a finished run to the model that ships: ``minidsv3/mini``.

    python book/ship_mini.py RUN

RUN is the folder that training wrote. The weights are rounded to FP8 blocks and written
in DeepSeek's layout; beside them go a tenth of the log, the curve of the held-out text,
and ``run.json``: the command, the versions, the text, and what the rounded model
reaches, measured here.
"""

import argparse
import ast
import csv
import json
import platform
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minidsv3 import checkpoints, corpus
from minidsv3.config import TrainConfig
from minidsv3.files import replacing
from minidsv3.generation.numpy_ref import generate
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.shipped import MINI_FOLDER
from minidsv3.training import run_folder
from minidsv3.training.torch_port import evaluate

HEADERS, TEMPERATURE, LONGEST = 200, 0.6, 400  # bytes of a completion
EVERY = 10  # rows of the log that are not kept, but one


def headers(how_many: int) -> list[str]:
    """The first ``def name(`` of held-out functions, evenly over the text."""
    ids = corpus.load_corpus().held_out
    text = bytes(ids[ids != corpus.BOUNDARY].tolist()).decode(errors="replace")
    found = re.findall(r"^def \w+\(", text, re.MULTILINE)
    found = list(dict.fromkeys(found))
    return [found[i * len(found) // how_many] for i in range(how_many)]


def of_one_function(text: str) -> str:
    """A text that begins with ``def`` up to the first line of something else."""
    end = re.search(r"\n(?=[^\s#])", text)
    return text[: end.start() + 1] if end else text[: text.rfind("\n") + 1]


def parses(text: str) -> bool:
    """Whether Python can read it, and there is something to read."""
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError):
        return False


def completions(folder: Path, prompts: list[str]) -> Iterator[str]:
    """What the model makes of each prompt, below two blank lines as in a file."""
    config, params = checkpoints.load(folder)
    for seed, prompt in enumerate(prompts):
        ids = corpus.encode("\n\n\n" + prompt)[None].astype(np.int64)
        new = generate(params, config, ids, LONGEST, TEMPERATURE, 1.0, seed)[0]
        ends = np.flatnonzero(new == corpus.BOUNDARY)
        new = new[: ends[0]] if len(ends) else new
        yield prompt + bytes(new.tolist()).decode(errors="replace")


def command(recipe: dict, every: int) -> str:
    """The command line that starts such a run again."""
    plain = TrainConfig()
    words = ["python", "-m", "minidsv3", "train", "--preset", "mini", "--backend"]
    words += ["torch", "--evaluate-every", str(every), "--out", "RUN"]
    for field in fields(TrainConfig):
        value = recipe[field.name]
        if value != getattr(plain, field.name):
            words += ["--set", f"{field.name}={value}"]
    return shlex.join(words)


def thinned(run: Path) -> list[list[str]]:
    """The log's header, and one row of ten."""
    with open(run / run_folder.LOG, newline="") as file:
        head, *rows = csv.reader(file)
    return [head, *(row for row in rows if int(row[0]) % EVERY == 0)]


def main() -> None:
    """Round, write, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    text = corpus.load_corpus()
    _, metadata = checkpoints.read_tensors(run / run_folder.STATE)
    recipe = json.loads(metadata["recipe"])
    if json.loads(metadata["text"]) != text.sha256:
        raise SystemExit("the run was trained on another text than this Python has")
    config, params = checkpoints.load(run)
    checkpoints.save(MINI_FOLDER, config, params, "float8_e4m3fn")
    log = MINI_FOLDER / run_folder.LOG
    with replacing(log) as beside, open(beside, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(thinned(run))
    held_out = (run / run_folder.HELD_OUT).read_text()
    (MINI_FOLDER / run_folder.HELD_OUT).write_text(held_out)

    length = recipe["sequence_length"]
    bits = {
        name: evaluate(DeepSeekV3.from_pretrained(folder), text.held_out, length)
        for name, folder in (("as trained", run), ("in FP8", MINI_FOLDER))
    }
    texts = list(tqdm(completions(MINI_FOLDER, headers(HEADERS)), total=HEADERS))
    whole = [of_one_function(written) for written in texts]
    every = int(held_out.splitlines()[1].split(",")[0])
    card = {
        "command": command(recipe, every),
        "date": str(date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread",
        "text": f"{text.name}, sha256 {text.sha256}",
        "training_tokens": recipe["steps"] * recipe["batch_size"] * length,
        "held_out_bits_per_byte": bits,
        "functions_that_parse": sum(map(parses, whole)) / HEADERS,
        "functions": f"{HEADERS} held-out headers below two blank lines, temperature "
        f"{TEMPERATURE}, at most {LONGEST} bytes, cut at the function's end",
    }
    with replacing(MINI_FOLDER / "run.json") as beside:
        beside.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
