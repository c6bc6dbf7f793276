"""FLARE itself (arXiv 2501.06892): fusion functions, the PEFT method, source states and who computes them.

Needs torch, transformers and peft alone: no Lightning, Hydra or OmegaConf.
"""
