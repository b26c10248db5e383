"""The benchmark suite: `rsaft-fast bench`, `pytest benchmarks`, and the tables and plots drawn from their results.

shapes     parameter lists of real models          floors   bytes that a pass must move
providers  ours and the peers, one row each        timing   device events, cold L2, alternation, bandwidths
suite      what is measured, in which order        results  one JSON file a run
goals, tables, plots, report                       what is read from a results file
"""
