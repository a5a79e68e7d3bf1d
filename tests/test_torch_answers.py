"""What the judge says of PyTorch answers besides right and wrong numbers."""

import pytest
from grader import spec
from grader.cell import Answer
from grader.source import find
from grader.tensors import NOTE, arriving, as_tensor
from grader.verdict import FAILED, PASSED, TODO, Verdict
from grader.workers import judged

ROTATE = """\
def rotate(x, rotation):
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    pair = [even * cos - odd * sin, even * sin + odd * cos]
    return torch.stack(pair, dim=-1).flatten(-2).to(x.dtype)
"""
LAYER = find("mla.torch.3").reference.partition("\n")[2]
BALANCE = find("moe.torch.3").reference.partition("\n")[2]
SAID = {
    "by NumPy": (
        "mla.torch.1",
        ROTATE.replace("cos, sin = rotation", "x = x.detach(); cos, sin = rotation"),
        "The result has left torch's graph",
    ),
    "an array": (
        "mla.torch.1",
        ROTATE.replace("= rotation", "= torch.tensor(x.numpy()).mean() * 0 + rotation"),
        "The answer works only without gradients",
    ),
    "half a graph": (
        "mla.torch.1",
        ROTATE.replace("even * sin", "even.detach() * sin"),
        "dx: ",
    ),
    "the angles changed": (
        "mla.torch.1",
        ROTATE.replace("    return", "    rotation += 1\n    return"),
        "Your function changes its argument `rotation`",
    ),
    "None": ("mla.torch.1", "def rotate(x, rotation):\n    x", "Your function returns"),
    "the placeholder": (
        "mla.torch.1",
        "def rotate(x, rotation):\n    x = x + 1\n    return ...",
        "Your function returns ..., the placeholder.",
    ),
    "two results": (
        "mla.torch.1",
        ROTATE.replace(".to(x.dtype)", ".to(x.dtype), x"),
        "Your function returns a tuple of 2; expected one array.",
    ),
    "the wrong shape": (
        "mla.torch.1",
        ROTATE.replace(".flatten(-2)", ""),
        "y has shape (1, 1, 2, 1, 2), expected (1, 1, 2, 2).",
    ),
    "no class": (
        "mla.torch.3",
        "def latent_attention(x):\n    return x",
        "No `LatentAttention` in the cell",
    ),
    "no module": (
        "mla.torch.3",
        LAYER.replace("(nn.Module)", ""),
        "Your class is no nn.Module",
    ),
    "an imported class": (
        "mla.torch.3",
        "from torch.nn import Linear as LatentAttention",
        "`LatentAttention` is borrowed",
    ),
    "the library's": (
        "mla.torch.3",
        "import minidsv3.mla.torch_port\n" + LAYER,
        "Borrowed from minidsv3",
    ),
    "a name too many": (
        "mla.torch.3",
        LAYER.replace("self.N_h, self", "self.more = nn.Linear(2, 2); self.N_h, self"),
        "Names in the state dict: more.weight is not DeepSeek's; more.bias is not",
    ),
    "half a class": (
        "moe.torch.3",
        BALANCE.replace("def loss", "def its_loss"),
        "AttributeError: 'Balance' object has no attribute 'loss'",
    ),
    "no super().__init__()": (
        "moe.torch.3",
        BALANCE.replace("super().__init__()", "pass"),
        "AttributeError: ",
    ),
}


def judge(id_: str, text: str) -> Verdict:
    return judged(Answer(id_, f"# exercise: {id_}\n{text}"))


@pytest.mark.parametrize(("id_", "text", "headline"), SAID.values(), ids=SAID)
def test_what_is_wrong_is_said(id_, text, headline):
    said = judge(id_, text)
    assert said.state == FAILED
    assert said.headline.startswith(headline), said.text()
    assert "grader" not in said.text()


def test_a_wrong_gradient_says_which_one_and_what_arrived():
    said = judge("mla.torch.1", ROTATE.replace("even * sin", "even.detach() * sin"))
    assert said.headline == "dx: 2 of 4 numbers differ"
    assert "expected" in said.detail
    assert said.notes[0] == NOTE
    told = judge("mla.torch.1", ROTATE.replace("odd * sin", "odd"))
    assert told.headline.startswith("y: ") and NOTE not in told.notes


def test_what_a_class_must_be_is_said_of_a_class():
    said = judge("mla.torch.3", "x = 1")
    assert said.advice.startswith("The cell must define a class with the name")
    said = judge("mla.torch.3", "LatentAttention = nn.Linear")
    assert "`class LatentAttention(...)`" in said.advice


@pytest.mark.parametrize("id_", ["mla.torch.3", "moe.torch.3", "mtp.torch.1"])
def test_a_class_half_written_is_judged_and_an_untouched_one_is_not(id_):
    stub = find(id_).stub
    assert judged(Answer(id_, stub)).state == TODO
    assert judged(Answer(id_, stub + "\n        # a thought")).state == TODO
    said = judged(Answer(id_, stub.replace("        ...\n", "        pass\n", 1)))
    assert said.state == FAILED


def test_complaints_of_form_are_told_apart():
    """Two mistakes that both raise WrongForm: each is called by its own name."""
    names = {"a rotated key for each head", "biases left on", "a module in a list"}
    for wrong in spec.find("mla.torch.3").wrong:
        if wrong.name in names:
            said = judged(
                Answer("mla.torch.3", wrong.patched(find("mla.torch.3").reference))
            )
            assert said.headline == f"Looks like: {wrong.name}"
            names.remove(wrong.name)
    assert not names


def test_tensors_lie_in_memory_as_the_arrays_did():
    import numpy as np

    array = np.arange(24.0).reshape(2, 3, 4).swapaxes(0, 2)
    tensor = as_tensor(array)
    assert not tensor.is_contiguous() and tensor.shape == array.shape
    assert tensor.stride() == tuple(n // 8 for n in array.strides)
    tensor += 1
    assert array[0, 0, 0] == 0
    inside = as_tensor({"a": (array, [array.astype(int)]), "b": 3})
    assert inside["a"][1][0].dtype.is_floating_point is False
    assert inside["b"] == 3


def test_what_arrives_has_no_two_numbers_alike():
    sent = arriving((4, 5, 6))
    assert sent.shape == (4, 5, 6) and len(set(sent.ravel().tolist())) == 120
    assert arriving(()).shape == ()


def test_a_right_answer_passes_and_says_where_another_stands():
    said = judge("mla.torch.1", ROTATE)
    assert said.state == PASSED
    assert said.notes[0].startswith("one way to write it: minidsv3/primitives/torch_p")
