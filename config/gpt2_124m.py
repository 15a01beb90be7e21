# GPT-2 124M: the published recipe, but for what docs/reproduction.md lists.
# Strategy: --reweight (quadratic was published with --r 1.0).
# Hardware: 1 GPU of 24 GB or more. Tokens: 20,000 steps x 32 sequences x 512 = 328M.
# Time: 0.7 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
# Nothing differs from the defaults of train.py, which are this recipe.
