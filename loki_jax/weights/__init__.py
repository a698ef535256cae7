"""Weights of other projects in and out: readers (`sources`), names (`layouts`), accounts (`ledger`), writers.

Name tables of single networks stand in `models/ldm_names.py` and `models/diffusers_names.py`.
"""
