# GPT-2 124M with LinUpper: the published recipe, but for what docs/reproduction.md lists.
# A file like this one keeps the flags of a run.
# Hardware: 1 GPU of 24 GB or more. Tokens: 20,000 steps x 32 sequences x 512 = 328M.
# Time: 0.7 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
reweight = "linupper"
