# GPT-2 355M: the recipe of the other sizes; the paper did not train this one.
# Strategy: --reweight.
# Hardware: 1 GPU of 80 GB or more. Tokens: 20,000 steps x 48 sequences x 512 = 492M.
# Time: 3.1 A100 hours (estimate: 6 FLOP per parameter and token, 30 % of the bf16 peak).
model = "355m"
global_batch_size = 48
