"""What sampling costs a pretrained model: the parts of bench/real_models.py.

checkpoints.py   the two models that pip brings, converted once, and any other
texts.py         texts and retrieval tasks, from the running Python's own library and documentation
methods.py       the attention of one decode step, by method
decode.py        exact prefill, teacher-forced decode, what is measured of each step
measures.py      intervals, bytes, recommendation
output.py        tables and plot
"""
