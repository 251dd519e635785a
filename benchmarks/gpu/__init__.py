"""The report for a GPU: steps in processes of their own, one JSON line a figure (python -m benchmarks.gpu_report).

A step is a generator of cases. Each case is a dictionary that names it, and a function that returns its figures; the
worker runs one after the other and writes a line after each. So a step that is stopped loses the case it was at, and
nothing else.
"""
