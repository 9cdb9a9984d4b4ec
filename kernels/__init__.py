"""Kernels of ao_act24: tensors and pointers in, tensors out. Nothing here knows graphs or autograd.

``layout``     how 2:4 metadata is stored, once
``cuda``       the Hopper kernels on torch tensors
``schedule``   how their tiles are shared out among the blocks of a launch
``reference``  the semantics of every op in plain torch: the oracle that each fast kernel is held to, bit by bit
``compile``    the CUDA kernels of ``csrc``: compiled when first launched, kept on disk
"""
