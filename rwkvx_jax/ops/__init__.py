"""Public operations: contracts, float32 oracles, XLA forms and the dispatch to Pallas kernels.

Shape letters, in signatures (jaxtyping, checked while tests run), names and docstrings everywhere:
B batch, T time, D model width, H heads, K key size per head, V value size per head,
F channel-mix width, R low-rank width, C chunk length, N number of chunks,
L RWKV blocks, M attention blocks, W vocabulary. Beside these:
Tq, Tk time of queries and of keys, J choices of a query, taps of the key convolution,
NR rows that a selector keeps of N chunks, *any leading dimensions.
"""
