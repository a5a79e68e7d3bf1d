"""What the CUDA kernels stand on: a GPU that runs in Python and does not forgive.

A kernel is a plain function over ``cuda.*`` and ``math.*`` in Numba's dialect. On a GPU
Numba compiles it. Here `simulator.launch` runs it one thread at a time, without a GPU
and without Numba, and says what a GPU would not: which two threads race, which index is
out of bounds, which threads never reach the barrier. `compile.compiled` makes of the
same function the machine code that a GPU would load, also without one, and counts what
is in it. In reading order:

    simulator   launch a kernel and count what it did
    dialect     the ``cuda`` object: threadIdx, syncthreads, shared.array, atomic, ...
    threads     threads, warps and blocks: who runs, who waits, who has seen what
    warps       shuffles and votes, as functions of the lanes' values
    memory      arrays that check every access
    races       who touched what, and what orders the two
    copies      copies that run beside their thread
    reports     the errors, and where in the kernel they happened
    watching    who did what at which instruction, in which turn
    counts      sectors and passes: what a warp's accesses take
    traces      one warp's steps, for a reader to go through
    intrinsics  what a kernel may say beyond cuda: wide loads, bf16, tensor cores
    tensor_cores  what those do, as functions of the lanes' values
    reductions  sums and maxima over a warp and a block, for kernels
    binding     a kernel made to see another cuda, another set of intrinsics
    compile     the machine code, and what is in it
    ptx         the intrinsics as instructions; needs numba-cuda
    launch      a kernel on torch's tensors: on their GPU, or simulated
    roofline    how fast a kernel could be, and how many of its warps fit
    machine_code  what a compiled kernel waits for
"""
