"""Weights of other projects in and out: readers (`sources`), layouts, key matching (`match`),
writers (`write`). Name tables of single networks are in `ldm_names` and `diffusers_names`.
"""
