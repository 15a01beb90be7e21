# GPT-2 124M, Quadratic: the published recipe.
# Hardware: 1 GPU of 24 GB or more. Tokens: 20,000 steps x 32 sequences x 512 = 328M.
# Time: 0.7 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
reweight = "quadratic"
r = 1.0  # as in the published file of this size; 0.4 elsewhere
