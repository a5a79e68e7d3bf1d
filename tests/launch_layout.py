"""What a kernel's code declares as its parameters, by Numba's rules.

An array of one dimension is seven: two pointers of Numba's own, the number of elements,
their size, the address, the length, the stride; each of eight bytes. A scalar is one,
of its own size.
"""


def parameter_sizes(signature: str) -> tuple[int, ...]:
    """Bytes of each parameter of a kernel with this signature, in order."""
    sizes: list[int] = []
    for word in signature.split():
        sizes += [8] * 7 if word.endswith("[]") else [int(word[1:])]
    return tuple(sizes)
