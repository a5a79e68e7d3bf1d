"""minidsv3: DeepSeek-V3 built from scratch, to be read.

The map, mechanism by implementation. Imports point downwards only::

    __main__      the command line
    options       what its words mean
    training      numpy_ref · torch_port · held_out · run_folder · command · processor
    generation    numpy_ref · decoding · prompts · rules · stopping · prefill
                  · numpy_decoder · torch_port · compiled · cpu_kernels
    model         numpy_ref · block_numpy_ref · torch_port
    mtp           numpy_ref · torch_port
    moe           numpy_ref · torch_port
    mla           numpy_ref · torch_port
    primitives    numpy_ref · attention_numpy_ref · torch_port · attention_torch_port
                  · cache · plain_cuda_kernels · fast_cuda_kernels · cuda_kernels
                  · work_of_cuda_kernels
    gpu           simulator · dialect · threads · warps · tensor_cores · memory
                  · races · copies · reports · watching · counts · traces
                  · intrinsics · reductions · binding · compile · ptx · machine_code
                  · launch · roofline
    parameters    names and shapes of every parameter
    checkpoints   models on disk, in DeepSeek's layout
    fp8           matrices in 8 bits, a scale for each block
    shards        a model's files in a folder: one, or several with an index
    safetensors_files  one of them: mapped, or written whole
    tokenizer     text -> ids -> bytes
    shipped       the trained MINI that comes with the package
    corpus        text -> bytes -> batches
    yardsticks    what a model must beat: unigram, bigram, xz
    config        one frozen Config in DeepSeek's words
    config_json   its border to config.json
    checks        what its numbers must be
    files         replaced whole or not at all
"""
