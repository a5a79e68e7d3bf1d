"""What the chapter on the port counts, weighs and compares."""

import ast
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

import minidsv3
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.moe.torch_port import Routing

ROOMS = ("primitives", "mla", "moe", "mtp", "model")


def lines(kind: str) -> tuple[int, int]:
    """Lines of code in the functions of the five rooms, forwards and backwards.

    ``kind`` ends the names of the modules, "numpy_ref" or "torch_port". Docstrings,
    signatures and comments do not count.
    """
    counts = {False: 0, True: 0}
    for room in ROOMS:
        for path in (Path(minidsv3.__file__).parent / room).glob(f"*{kind}.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    body = node.body[ast.get_docstring(node) is not None :]
                    size = sum(len(ast.unparse(s).splitlines()) for s in body)
                    counts["backward" in node.name] += size
    return counts[False], counts[True]


def shake_biases(params: dict, rng: np.random.Generator) -> None:
    """Give the routers' biases values, so that they matter."""
    for name, array in params.items():
        if name.endswith("bias"):
            array[:] = rng.normal(0, 0.1, array.shape)


def print_graph(y: Tensor) -> None:
    """Autograd's list behind y, as a tree; leaves by their shape."""

    def walk(node: object, depth: int) -> None:
        name = type(node).__name__.removesuffix("0")
        leaf = getattr(node, "variable", None)
        said = f"leaf {tuple(leaf.shape)}" if leaf is not None else name
        print("   " * depth + said)
        for below, _ in node.next_functions:
            if below is not None:
                walk(below, depth + 1)

    walk(y.grad_fn, 0)


@contextmanager
def saved_bytes() -> Iterator[SimpleNamespace]:
    """Count what autograd keeps while the block runs: ``.total``, weights apart."""
    seen, count = set(), SimpleNamespace(total=0)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and not isinstance(tensor, nn.Parameter):
            if not (tensor.is_leaf and tensor.requires_grad):
                count.total += storage.nbytes()
            seen.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def nbytes(saved: object, params: dict) -> int:
    """Bytes of all arrays in a nest of tuples, each memory once, the weights apart."""
    seen: dict[int, int] = {}
    weights = {id(array) for array in params.values()}

    def walk(what: object) -> None:
        if isinstance(what, np.ndarray):
            base = what if what.base is None else what.base
            if id(base) not in weights:
                seen[id(base)] = getattr(base, "nbytes", what.nbytes)
        elif isinstance(what, tuple | list):
            for part in what:
                walk(part)

    walk(saved)
    return sum(seen.values())


def gap(ours: np.ndarray, theirs: Tensor) -> float:
    """‖difference‖ / ‖ours‖."""
    return float(np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(ours))


def input_of(model: DeepSeekV3, part: nn.Module, ids: Tensor) -> Tensor:
    """What a part of the model is given when it reads ids: (N, D)."""
    seen = []
    hook = part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].flatten(0, 1)


def other_set(one: Tensor, other: Tensor) -> float:
    """The part of tokens whose experts are not the same set: both (N, K)."""
    differs = one.sort(-1).values != other.sort(-1).values
    return differs.any(-1).float().mean().item()


def price_of(
    experts: Callable, u: Tensor, routing: Routing, turns: int = 3
) -> tuple[float, int]:
    """Seconds forth and back (best of some turns), and bytes kept in between."""
    best = []
    for _ in range(turns + 1):
        u_in = u.detach().clone().requires_grad_()
        gates = routing.gates.detach().clone().requires_grad_()
        began = time.perf_counter()
        with saved_bytes() as kept:
            y = experts(u_in, Routing(routing.experts, gates, routing.affinities))
        y.square().sum().backward()
        best.append((time.perf_counter() - began, kept.total))
    return min(best[1:])
