"""Measures the passes of a SAM update (`rsaft-fast bench`) and whole updates (`gpu_memory`), and shows the results.

What `rsaft-fast bench` imports needs torch alone; what is at home in whole updates needs diffusers and transformers.
"""
