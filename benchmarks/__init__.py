"""The benchmark suite: `rsaft-fast bench`, `pytest benchmarks`, and the tables and plots drawn from their results.

shapes     parameter lists of real models          floors     bytes that a pass must move
providers  ours and the peers, one row each        timing     device events, cold L2, alternation
jobs       what is measured, in which order        suite      measures it
results    one JSON format for all                 goals      goals.txt held against results
gpu_memory, memory_*, meter, random_models         whole updates at real size
tables, memory_tables, plots, report               what is read from results

`rsaft-fast bench` imports the first four lines alone; whole updates are a program of their own.
"""
