"""minidsv3: DeepSeek-V3 built from scratch, to be read.

The map, mechanism by implementation. Imports point downwards only::

    __main__      the command line
    options       what its words mean
    training      numpy_ref · run_folder
    generation    numpy_ref
    model         numpy_ref · block_numpy_ref
    mtp           numpy_ref
    moe           numpy_ref
    mla           numpy_ref
    primitives    numpy_ref · attention_numpy_ref
    gpu           simulator · dialect · threads · warps · memory · binding · reports
    parameters    names and shapes of every parameter
    checkpoints   models on disk, in DeepSeek's layout
    fp8           matrices in 8 bits, a scale for each block
    shards        a model's files in a folder: one, or several with an index
    safetensors_files  one of them: mapped, or written whole
    tokenizer     text -> ids -> bytes
    corpus        text -> bytes -> batches
    yardsticks    what a model must beat: unigram, bigram, xz
    config        one frozen Config in DeepSeek's words
    config_json   its border to config.json
    checks        what its numbers must be
    files         replaced whole or not at all
"""
