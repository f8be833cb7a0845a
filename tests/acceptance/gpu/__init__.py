"""What one GPU tells in ten minutes: `python -m tests.acceptance.gpu --minutes 10 --out DIR`; see docs/results.

Parts: a, unit checks on the device; b, drawing with SDXL's full width; c, training steps at full width; d, training of
the generator's base. A part is a list of steps, most important first. Each
part runs in a process of its own, which writes DIR/part-X.json after every step. A step that fails, hangs or takes its
process down costs the others nothing: the process is started again with the steps that are left.
"""
