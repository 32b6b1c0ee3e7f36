"""The operations of a decoder layer.

`rms_norm.py`, `matmul.py`, `swiglu.py`, `attention.py` and `rotary.py` hold the definitions. `cpu.py` has forms of them
for XLA's CPU compiler, `pallas.py` attention's kernels for GPUs and TPUs, and `select.py` chooses between them.
"""
