"""The FLARE method (arXiv 2501.06892): fusion functions, PEFT method, source states and encoders.

Needs torch, transformers and peft alone: no Lightning, Hydra or OmegaConf.
"""
